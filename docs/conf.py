"""How these pages become a website: `sphinx-build docs site`, with furo and myst-parser.

Formulas become MathML, which browsers show without a script.
"""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = html_title = "smidgen"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_show_copyright = False
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))


def inline(page: HTML5Translator, node: nodes.math) -> None:
    """A formula in a sentence; a word joiner keeps a full stop after it on its line."""
    page.body.append(tex2mathml(node.astext()) + "\u2060")
    raise nodes.SkipNode


def display(page: HTML5Translator, node: nodes.math_block) -> None:
    """A formula on its own line; one that is wider than a phone scrolls."""
    page.body.append(f'<div style="overflow-x: auto">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode
