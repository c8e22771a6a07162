"""Where a model has something to gain, as a table for a terminal and as a picture of the model that stands alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from smidgen.process.identification import Sensitivity
from smidgen.report.svg import add, document

_CELL_HEIGHT, _LEFT, _TOP = 26.0, 90.0, 78.0
_STYLE = (
    "text { font: 12px system-ui, sans-serif; fill: currentColor } .title { font-weight: 600 } .cell { fill: #2563eb }"
)


def as_table(found: Sequence[Sensitivity], ranks: Mapping[str, int] | None) -> Table:
    """A row for each block, the last on top, a column for each kind of layer: its share, and its rank if given."""
    cells, blocks, kinds = _grid(found)
    table = Table(box=None, pad_edge=False, caption=_legend(ranks), caption_justify="left")
    table.add_column("Block", vertical="bottom")
    for name in _short(kinds):
        table.add_column(Text(name.replace(".", ".\n")), justify="right", overflow="fold")
    for block in reversed(blocks):
        row = [_cell(cells.get((block, kind)), ranks) for kind in kinds]
        table.add_row(_number(block), *map(Text, row))
    return table


def as_picture(found: Sequence[Sensitivity], ranks: Mapping[str, int] | None, title: str) -> str:
    """An SVG document: the same table, each cell the darker the more its layer has to gain."""
    cells, blocks, kinds = _grid(found)
    names = _short(kinds)
    cell = max(96.0, *(16 + 7.0 * len(name) for name in names))
    width, height = _LEFT + cell * len(kinds) + 8, _TOP + _CELL_HEIGHT * len(blocks) + 12
    svg = document(width, height, title=title, style=_STYLE)
    add(svg, "text", {"x": 8, "y": 20, "class": "title"}, title)
    add(svg, "text", {"x": 8, "y": 38}, _legend(ranks))
    for column, name in enumerate(names):
        middle = _LEFT + (column + 0.5) * cell
        add(svg, "text", {"x": middle, "y": _TOP - 10, "text-anchor": "middle"}, name)
    largest = max((layer.share for layer in found), default=0.0) or 1.0
    for row, block in enumerate(reversed(blocks)):
        top = _TOP + row * _CELL_HEIGHT
        add(svg, "text", {"x": 8, "y": top + 17}, f"block {_number(block)}")
        for column, kind in enumerate(kinds):
            layer = cells.get((block, kind))
            if layer is None:
                continue
            left = _LEFT + column * cell
            group = add(svg, "g", {})
            add(group, "title", {}, f"{layer.place}: {100 * layer.share:.2g} % of what there is to gain")
            shade = f"{0.06 + 0.6 * (layer.share / largest) ** 0.5:.2f}"
            box: dict[str, str | float] = {"x": left + 1, "y": top + 1, "width": cell - 2, "height": _CELL_HEIGHT - 2}
            add(group, "rect", {**box, "rx": 3, "class": "cell", "fill-opacity": shade})
            text: dict[str, str | float] = {"x": left + cell / 2, "y": top + 17, "text-anchor": "middle"}
            add(group, "text", text, _cell(layer, ranks))
    return ET.tostring(svg, encoding="unicode") + "\n"


def _grid(found: Sequence[Sensitivity]) -> tuple[dict[tuple[str, str], Sensitivity], list[str], list[str]]:
    cells = {(layer.block, layer.kind): layer for layer in found}
    return cells, list(dict.fromkeys(layer.block for layer in found)), list(dict.fromkeys(own.kind for own in found))


def _cell(layer: Sensitivity | None, ranks: Mapping[str, int] | None) -> str:
    if layer is None:
        return ""
    rank = 0 if ranks is None else ranks[layer.place]
    return f"{100 * layer.share:.1f}" + (f" ({rank})" if rank else "")


def _legend(ranks: Mapping[str, int] | None) -> str:
    return "Parts of what there is to gain, in %" + ("" if ranks is None else "; in brackets the ranks bought")


def _number(block: str) -> str:
    return block.rpartition(".")[2]


def _short(kinds: Sequence[str]) -> list[str]:
    """As much of the end of each name as tells it from the others."""
    ends = [[".".join(kind.split(".")[-n:]) for n in range(1, kind.count(".") + 2)] for kind in kinds]
    return [next(end for end in own if sum(end in other for other in ends) == 1 or end == own[-1]) for own in ends]
