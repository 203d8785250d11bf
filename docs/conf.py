"""Sphinx settings. `build.py` gives Sphinx a copy, so nothing is written into docs/."""

import inspect
import pathlib
import sys

from emfuse_jax import __version__

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from repository import REPOSITORY

project = "emfuse_jax"
author = "The emfuse_jax authors"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["**.ipynb_checkpoints"]

html_theme = "sphinx_book_theme"
html_title = "emfuse_jax"
html_theme_options = {
    "show_toc_level": 2,
    "show_navbar_depth": 2,
    "repository_url": f"https://github.com/{REPOSITORY}",
    "use_repository_button": True,
}

# In the code's docstrings `name` is code, as in Markdown.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_generate = False
autodoc_preserve_defaults = True

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "substitution"]
myst_substitutions = {"repository": f"`{REPOSITORY}`"}
myst_heading_anchors = 3


def _skip_field_numbers(app, what, name, obj, skip, options):
    """The fields of a NamedTuple are in its docstring, not "field number 0"."""
    return skip or (inspect.getdoc(obj) or "").startswith("Alias for field number")


def _short_arrays(app, what, name, obj, options, signature, result):
    """``Float[Array, ...]`` as it is written."""

    def short(text):
        return text and text.replace("jaxlib._jax.Array", "Array")

    return short(signature), short(result)


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _short_arrays)
    app.connect("autodoc-skip-member", _skip_field_numbers)
