"""Which modules of an adapter are single experts of a mixture, and how much each expert changed, in words."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from lowrank.analysis.inspection import Inspection, Layer
from lowrank.analysis.words import count, number

EXPERT_NUMBER = re.compile(r"experts\.[0-9]+\.")
EXPERT = re.compile(r"(?:.*\.)?experts\.(?P<number>[0-9]{1,9})\.(?P<leaf>\w+)")


def is_expert(layer: Layer) -> bool:
    """Whether the module is one expert's."""
    return EXPERT.fullmatch(layer.measure.path) is not None


def others(layers: Sequence[Layer]) -> list[Layer]:
    """The layers that are no single experts."""
    return [layer for layer in layers if not is_expert(layer)]


def leaf_and_number(layer: Layer) -> tuple[str, int]:
    """(which of an expert's projections the module is, the expert's number)."""
    match = EXPERT.fullmatch(layer.measure.path)
    assert match is not None
    return match["leaf"], int(match["number"])


def by_projection(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """{projection: its experts}, each under its number instead of a module's name; without other layers."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if is_expert(layer):
            leaf, number = leaf_and_number(layer)
            found.setdefault(leaf, []).append(replace(layer, place=replace(layer.place, module=f"{number}")))
    return found


def kind_of_module(layer: Layer) -> str:
    """The module's short name, the same for all experts."""
    return EXPERT_NUMBER.sub("experts.N.", layer.place.module)


def experts_in_words(inspection: Inspection) -> Iterator[str]:
    """Which expert changed most and least, over all of its projections; nothing where there are no experts."""
    squares: dict[tuple[int | None, int], float] = {}
    for layer in inspection.layers:
        if is_expert(layer):
            key = layer.place.layer, leaf_and_number(layer)[1]
            squares[key] = squares.get(key, 0.0) + layer.measure.norm**2
    if not squares:
        return
    ranked = sorted(squares, key=lambda key: -squares[key])
    norms = [math.sqrt(squares[key]) for key in ranked]
    idle = sum(norm == 0 for norm in norms)
    tail = f"; {count(idle, 'expert')} did not change at all" if idle else ""
    layers = count(len({layer for layer, _ in ranked}), "layer")
    yield (
        f"Of {count(len(ranked), 'expert')} in {layers}, {_expert(ranked[0])} changed most (‖ΔW‖ {number(norms[0])}, "
        f"all its projections together), {_expert(ranked[-1])} least ({number(norms[-1])}); the median is "
        f"{number(median(norms))}{tail}."
    )


def _expert(key: tuple[int | None, int]) -> str:
    layer, expert = key
    return f"expert {expert}" + ("" if layer is None else f" of layer {layer}")
