"""What a page of the report is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lowrank.analysis.figures.heat_map import Value, column_names, heat_map
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
    """A heat map with its words; without a scale, from 0 to the largest value."""
    highest = max((v for layer in layers if (v := value(layer)) is not None), default=0.0)
    drawn = heat_map(layers, value, scale or Scale(0.0, highest or 1.0), title)
    return Figure(title, how, (Markup(drawn),))


def by_module(layers: Sequence[Layer]) -> list[tuple[str, list[Layer]]]:
    """The layers of every kind of module, in the order in which a layer has them."""
    return [(name, [layer for layer in layers if layer.place.module == name]) for name in column_names(layers)]
