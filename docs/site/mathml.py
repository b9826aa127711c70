"""Formulas as MathML, which browsers draw by themselves: no script, and nothing from a network."""

from docutils import nodes  # pyright: ignore[reportMissingModuleSource]
from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports]


def visit_inline(writer, node: nodes.math) -> None:
    """Write a formula within a line."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_block(writer, node: nodes.math_block) -> None:
    """Write a formula that stands alone; a wide one scrolls within itself."""
    writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
