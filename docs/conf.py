"""How Sphinx builds the site: CONTRIBUTING.md has the command."""

import os
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project = "corm-jax"
project_copyright = "the authors of corm-jax"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_design",
    "reference",
]

# Pages. Markdown's anchors are GitHub's, so that a link works in both places.
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_merge_streams = True
# Nearly all of the time goes into compiling: the notebooks, which run one after the other, share what is compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no alarms about slow compiles among the outputs

# The reference. `reference.py` resolves the names in docstrings, and takes signatures as they stand in the source.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False  # "q, k, v: ..." stays one entry
napoleon_use_rtype = False
napoleon_attr_annotations = False
python_maximum_signature_line_length = 80
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"

# Looks.
html_theme = "furo"
html_title = "corm-jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# The address of the repository stands in one place, `[project.urls]` of pyproject.toml.
urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
if "Repository" in urls:
    html_theme_options = {
        "source_repository": urls["Repository"],
        "source_branch": "main",
        "source_directory": "docs/",
    }
