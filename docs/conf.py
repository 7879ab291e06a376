"""Settings of the documentation site: `sphinx-build -W -b html docs docs/_build`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import biodedup  # noqa: E402

project = "biodedup"
author = "the biodedup contributors"
copyright = author
release = version = biodedup.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "commands",
]
exclude_patterns = ["_build", "_ext"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
suppress_warnings = [
    "docutils"
]  # docstrings are plain prose, not reStructuredText: `*` and `|` in them mean themselves

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # `clock=time.time`, not the address of a function
autodoc_class_signature = "mixed"

html_theme = "pydata_sphinx_theme"
html_title = f"biodedup {release}"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}
smartquotes_action = "qe"  # two hyphens stay what they are: options begin with them
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
# pages without pages below them have nothing to show at the side
_ALONE = ("getting-started", "first-steps", "concepts", "benchmarks", "models", "glossary")
html_sidebars: dict[str, list[str]] = {page: [] for page in _ALONE}
