"""What holds for the package as a whole."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import corm_jax
import simulator


def test_importing_needs_only_the_core():
    extras = {"click", "gguf", "huggingface_hub", "matplotlib", "safetensors", "simulator", "tokenizers", "torch"}
    code = f"import sys, corm_jax; sys.exit(', '.join(sorted({extras!r} & set(sys.modules))) or 0)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_version_is_that_of_the_distribution():
    """`corm_jax.__version__` is the one place where it stands. If they differ, install the package once more."""
    assert corm_jax.__version__ == version("corm-jax")


def test_type_checkers_see_the_annotations():
    for package in (corm_jax, simulator):
        assert (Path(package.__file__).parent / "py.typed").exists()
