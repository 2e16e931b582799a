# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration: ``pip install '.[docs]' && sphinx-build -W docs docs/_build``."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import peftkern

project = "peftkern"
author = "The peftkern contributors"
copyright = "The peftkern contributors. Apache-2.0"
release = version = peftkern.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "cli_help",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "code"
highlight_language = "none"  # drawings and formulas in docstrings; examples are recognised by their prompt
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types together with shapes
napoleon_use_ivar = True

html_theme = "pydata_sphinx_theme"
html_title = "peftkern"
html_static_path = ["_static"]
html_css_files = ["peftkern.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
}
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Sphinx) -> None:
    """Show the implementation's signature of overloaded functions. Overloads serve type checkers."""
    analyze = ModuleAnalyzer.analyze

    def without_overloads(self: ModuleAnalyzer) -> None:
        analyze(self)
        self.overloads = {}

    ModuleAnalyzer.analyze = without_overloads  # type: ignore[method-assign]
