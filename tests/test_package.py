"""What holds for the package as a whole."""

import subprocess
import sys


def test_importing_needs_only_the_core():
    extras = {"click", "gguf", "huggingface_hub", "matplotlib", "safetensors", "simulator", "tokenizers", "torch"}
    code = f"import sys, corm_jax; sys.exit(', '.join(sorted({extras!r} & set(sys.modules))) or 0)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
