"""What holds for the package as a whole."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import setuptools

import corm_jax
import simulator

ROOT = Path(__file__).parents[1]


def test_importing_needs_only_the_core():
    extras = {"click", "gguf", "huggingface_hub", "matplotlib", "safetensors", "simulator", "tokenizers", "torch"}
    code = f"import sys, corm_jax; sys.exit(', '.join(sorted({extras!r} & set(sys.modules))) or 0)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_version_is_that_of_the_distribution():
    """`corm_jax.__version__` is the one place where it stands. If they differ, install the package once more."""
    assert corm_jax.__version__ == version("corm-jax")


@pytest.mark.skipif(not ((ROOT / ".ci" / "release").exists() and shutil.which("git")), reason="needs a clone and git")
def test_a_release_without_an_address_is_refused(tmp_path):
    """Without the repository's address README's links lead nowhere on the page of the package; nothing is built."""
    for name in (".ci/release", "docs/links.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    project = re.sub(r"\[project\.urls\]\n(?:[^\[\n].*\n|\n)*", "", (ROOT / "pyproject.toml").read_text())
    (tmp_path / "pyproject.toml").write_text(project)
    (tmp_path / "CHANGELOG.md").write_text("## Unreleased\n\n## 9.9.9 - 2026-01-31\n\n- Everything.\n")
    (tmp_path / "corm_jax").mkdir()
    (tmp_path / "corm_jax" / "__init__.py").write_text('__version__ = "9.9.9"\n')
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    python = {**os.environ, "PYTHON": sys.executable}
    ran = subprocess.run(
        [".ci/release", "9.9.9"], cwd=tmp_path, env=python, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert "release: pyproject.toml has no Repository under [project.urls]" in ran.stderr
    assert "add it, as in Repository = " in ran.stderr
    links = [sys.executable, "docs/links.py", "--absolute", "v9.9.9"]
    (tmp_path / "pyproject.toml").write_text(project + '\n[project.urls]\nRepository = "https://example.org/corm"\n')
    page = subprocess.run(links, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "](https://example.org/corm/blob/v9.9.9/docs/start.md)" in page
    assert "](https://example.org/corm/raw/v9.9.9/docs/compare.png)" in page
    assert not re.findall(r"\]\((?!https://)", page)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a clone")
def test_every_folder_with_code_is_in_the_wheel():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = setuptools.find_packages(str(ROOT), **tool["packages"]["find"])
    folders = {path.parent for name in ("corm_jax", "simulator") for path in (ROOT / name).rglob("*.py")}
    assert sorted(packages) == sorted(str(folder.relative_to(ROOT)).replace(os.sep, ".") for folder in folders)


def test_type_checkers_see_the_annotations():
    for package in (corm_jax, simulator):
        assert (Path(package.__file__).parent / "py.typed").exists()
