import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import hypothesis
import jax
import pytest
from jax._src import lru_cache

from corm_jax.terminal import stopping

# Nearly all of the time goes into compiling programs that run for a moment: LLVM need not polish them, nor MLIR write
# their kernels, nor several threads share them. Those of users are polished, so one leg of .ci/run sets
# CORM_JAX_OPTIMIZED=1 for the tests of decisions.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # later ones do not know it, and end at what they do not know
    QUICK += ["--xla_cpu_use_fusion_emitters=false"]
if not os.environ.get("CORM_JAX_OPTIMIZED"):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])

# What was compiled is kept for other modules, other workers and the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _put(self, key, value):
    """Stores a program in JAX's cache whole or not at all: JAX writes in place, and another worker may read then."""
    place = self.path / f"{key}-cache"
    if not place.exists():
        part = self.path / f"{key}-{os.getpid()}-part"
        part.write_bytes(value)
        part.replace(place)


lru_cache.LRUCache.put = _put

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=60, report_multiple_bugs=False
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _strict():
    """No dtype is promoted by accident. (Ranks are, on purpose: leading axes broadcast over the slots.)"""
    with jax.numpy_dtype_promotion("strict"):
        yield


def pytest_collection_finish():
    """What was imported stays, and JAX makes objects by the million: Python need not look through them all the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def _forget():
    """Frees compiled programs: hundreds of them in one process exhaust its memory maps, and XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a command line in this process: exit code, output, errors."""
    monkeypatch.setattr("corm_jax.terminal.compiled.keep", lambda: None)
    monkeypatch.setattr("corm_jax.terminal.console.FIRST", 3600.0)  # no lines of progress, however slow the machine is
    monkeypatch.setattr("os._exit", sys.exit)

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", [*map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
        with pytest.raises(SystemExit) as stopped:
            main()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Hugging Face directory with a tokenizer."""
    from tests.test_checkpoint import byte_level_tokenizer
    from tests.test_model import hugging_face

    path = tmp_path_factory.mktemp("model")
    hugging_face(path, vocab_size=400)
    byte_level_tokenizer().save(str(path / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    )
    (path / "chat_template.jinja").write_text(template + "<|im_start|>assistant{{ '\\n' }}")
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(model, tmp_path_factory):
    """Copies of the model, each with a tokenizer that puts something else around a text."""
    from tests.test_texts import AROUND, byte_level

    found = {}
    for name in AROUND:
        found[name] = str(shutil.copytree(model, tmp_path_factory.mktemp("models") / "model"))
        byte_level(name).inner.save(f"{found[name]}/tokenizer.json")
    return found


@pytest.fixture
def data(tmp_path):
    """A directory as LongBench has it."""
    from tests.test_checkpoint import TEXT

    folder = tmp_path / "longbench"
    folder.mkdir()
    row = {"input": "who?", "context": TEXT * 4, "answers": ["it"], "all_classes": None}
    (folder / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    (folder / "trec.jsonl").write_text(json.dumps(row | {"all_classes": ["a"]}) + "\n")
    templates = {"qasper": "Read. {context} Now: {input}", "trec": "{context}\n{input}"}
    (folder / "dataset2prompt.json").write_text(json.dumps(templates))
    (folder / "dataset2maxlen.json").write_text('{"qasper": 16, "trec": 8}')
    return folder
