"""Sphinx: the site of README, docs and the other pages, as they lie in the repository.

The source folder is the root of the repository, so a link that works in a checkout, or where its
pages are shown, works here. ``make docs`` builds it.
"""

import inspect
import sys
from pathlib import Path

from sphinx.util.inspect import stringify_signature  # pyright: ignore[reportMissingImports]

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
sys.path[:0] = [str(FOLDER), str(ROOT)]

import api_pages  # noqa: E402
import mathml  # noqa: E402

import mlx_sparse_nn  # noqa: E402

project = "mlx_sparse_nn"
author = "The mlx_sparse_nn authors"
version = release = mlx_sparse_nn.__version__
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "README"
# Below each heading, the pages of the menu, in the order in which a newcomer needs them.
MENU = {
    "Start": ["docs/install", "docs/layers", "docs/patterns", "docs/arrays", "docs/examples"],
    "Models": [
        "docs/sparsify",
        "docs/pretrained",
        "docs/mlx_lm",
        "docs/distributed",
        "docs/export",
    ],
    "Physics": ["docs/physics"],
    "How it works": ["docs/backends", "docs/gallery", "docs/design", "benchmarks/README"],
    "API": [f"docs/api/{key}" for key in api_pages.PAGES],
    "The project": ["docs/release_0_1_0", "CHANGELOG", "CONTRIBUTING", "SECURITY"],
}
OTHERS = [  # linked, not in the menu
    "mlx_sparse_nn/metal/README",
    "tests/emulators/metal_emulator/README",
    "tests/emulators/cuda_emulator/README",
]
PAGES = [root_doc, *(page for pages in MENU.values() for page in pages), *OTHERS]
include_patterns = [f"{page}.md" for page in PAGES]

# Markdown as GitHub reads it.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # pages that begin with a heading of the second level

# Docstrings: what is inherited counts, what MLX's modules bring does not.
autodoc_default_options = {
    "members": True,
    "inherited-members": "Module, dict, tuple, ValueError, AssertionError, Exception",
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
html_math_renderer = "mathml"

html_theme = "furo"
html_title = "mlx_sparse_nn"
html_static_path = [str(FOLDER / "static")]
html_css_files = ["site.css"]
html_favicon = str(FOLDER / "static/icon.svg")
html_extra_path = [str(FOLDER / "extra")]  # index.html, which leads to README.html
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7db8f5", "color-brand-content": "#7db8f5"},
}


def add_menu(app, docname, source) -> None:
    """Put the menu below the README: where GitHub shows the page, it would be code."""
    if docname in OTHERS:
        source[0] = f"---\norphan: true\n---\n{source[0]}"
    if docname == root_doc:
        for heading, pages in MENU.items():
            tree = [f":caption: {heading}", ":hidden:", "", *(f"/{page}" for page in pages)]
            source[0] += "\n".join(["", "```{toctree}", *tree, "```", ""])


def add_signature(app, what, name, value, options, signature, returns):
    """Show how a class is called: a ``__new__`` that takes anything hides ``__init__``."""
    if what == "class" and signature and signature.startswith("(*args"):
        called = inspect.signature(value.__init__)
        rest = list(called.parameters.values())[1:]
        return stringify_signature(
            called.replace(parameters=rest), unqualified_typehints=True
        ), returns
    return None


def setup(app) -> None:
    api_pages.write(ROOT / "docs/api")
    mathml.setup(app)
    app.connect("source-read", add_menu)
    app.connect("autodoc-process-signature", add_signature)
