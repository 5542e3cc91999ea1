"""One figure of every module at a glance: layers downwards, the kinds of module across."""

import math
from collections.abc import Callable, Sequence

from lowrank.analysis.figures.scale import Scale
from lowrank.analysis.figures.svg import picture, tag, text, title
from lowrank.analysis.inspection import Layer
from lowrank.analysis.words import number

ROOM = 840  # pixels for all columns
CELL_HEIGHT = 20
LEFT = 64
NUMBERS_FROM = 40  # width of a cell from which its number is written into it

Value = Callable[[Layer], float | None]


def heat_map(layers: Sequence[Layer], value: Value, scale: Scale, label: str) -> str:
    """The map of `value`; a module without one stays empty. Numbers stand in the cells where there is room."""
    names = column_names(layers)
    rows = sorted({layer.place.layer for layer in layers}, key=lambda n: (n is None, n))
    width = max(9.0, min(92.0, ROOM / len(names)))
    turned = any(len(name) * 7.2 > width for name in names)
    head = 24.0 + (max(map(len, names)) * 5.2 if turned else 0)
    every = max(1, math.ceil(22 / width))  # where columns are narrower than words are high, only some are named
    parts = [_heading(LEFT + (i + 0.5) * width, head - 8, names[i], turned) for i in range(0, len(names), every)]
    for i, row in enumerate(rows):
        words = "–" if row is None else f"layer {row}"
        parts.append(text(LEFT - 8, head + i * CELL_HEIGHT + 14, words, "tick end"))
    for layer in layers:
        x, y = LEFT + names.index(layer.place.module) * width, head + rows.index(layer.place.layer) * CELL_HEIGHT
        parts.append(_cell(x, y, width, layer, value(layer), scale))
    bottom = head + len(rows) * CELL_HEIGHT
    total = LEFT + len(names) * width + (max(map(len, names)) * 5 if turned else 8)
    return picture(max(total, LEFT + 260), bottom + 34, [*parts, *scale.legend(LEFT, bottom + 12)], label)


def column_names(layers: Sequence[Layer]) -> list[str]:
    """The kinds of module, in the order in which a layer has them."""
    return list(dict.fromkeys(layer.place.module for layer in layers))


def _heading(x: float, y: float, name: str, turned: bool) -> str:
    return text(x - 4, y, name, "tick", -35) if turned else text(x, y, name, "tick middle")


def _cell(x: float, y: float, width: float, layer: Layer, value: float | None, scale: Scale) -> str:
    shape = {"x": x, "y": y, "width": width - 1.5, "height": CELL_HEIGHT - 1.5, "rx": 2}
    path = layer.measure.path
    if value is None:
        return tag("rect", shape | {"class": "none"}, title(f"{path}: no such figure"))
    cell = tag("rect", shape | {"class": scale.style(value)}, title(f"{path}: {number(value)}"))
    if width < NUMBERS_FROM:
        return cell
    words = number(value) if width >= 52 else f"{value:.2g}"
    return cell + text(x + width / 2 - 0.75, y + 13.5, words, f"cell {scale.ink(value)}")
