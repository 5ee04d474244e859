import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=60, report_multiple_bugs=False
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _strict():
    """No dtype is promoted by accident. (Ranks are, on purpose: leading axes broadcast over the slots.)"""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget():
    """Frees compiled programs: hundreds of them in one process exhaust its memory maps, and XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a command line in this process: exit code, output, errors."""

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", [*map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run
