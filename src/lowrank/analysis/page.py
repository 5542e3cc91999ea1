"""What a page of the report is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lowrank.analysis.experts import by_projection, kind_of_module, others
from lowrank.analysis.figures.heat_map import Value, heat_map
from lowrank.analysis.figures.scale import Scale
from lowrank.analysis.inspection import Layer


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure, of one or more pictures. how: a line on how to read it; folded: shown when it is asked for."""

    title: str
    how: str
    pictures: tuple[Markup, ...]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table of figures. how: a line on how to read it."""

    title: str
    how: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...] = ()


def map_figure(layers: Sequence[Layer], title: str, how: str, value: Value, scale: Scale | None = None) -> Figure:
    """A heat map with its words; without a scale, from 0 to the largest value.

    Experts of a mixture are too many to be modules among others: each of their projections has a map of layers and
    experts, in the same scale.
    """
    highest = max((v for layer in layers if (v := value(layer)) is not None), default=0.0)
    scale = scale or Scale(0.0, highest or 1.0)
    dense, by_leaf = others(layers), by_projection(layers)
    drawn = [heat_map(dense, value, scale, title)] if dense else []
    drawn += [heat_map(found, value, scale, f"{title}: {leaf}") for leaf, found in by_leaf.items()]
    if by_leaf:
        how += f" Experts across, layers downwards, a map for each projection: {' and '.join(by_leaf)}, from above."
    return Figure(title, how, tuple(map(Markup, drawn)))


def by_module(layers: Sequence[Layer]) -> list[tuple[str, list[Layer]]]:
    """The layers of every kind of module, in the order in which a layer has them; all experts' are one kind."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(kind_of_module(layer), []).append(layer)
    return list(kinds.items())
