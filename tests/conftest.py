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
