"""How Sphinx builds these pages; `tox -e docs` or scripts/test does it, warnings as errors."""

import importlib.metadata

project = "blockferry"
author = "The blockferry developers"
copyright = author  # noqa: A001 - Sphinx's own name
release = importlib.metadata.version("blockferry")
version = release

extensions = ["myst_parser"]
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "blockferry"
nitpicky = True
