"""Where a module stands in the model: in which layer of the stack, and which projection of that layer it is.

`model.layers.3.self_attn.q_proj` is q_proj of layer 3: the first number in a path is the layer.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Place:
    """layer: its number, None for a module outside any stack; module: a short name, the same in every layer."""

    layer: int | None
    module: str


def natural(path: str) -> list[tuple[int, str]]:
    """A sort key by which layer 2 comes before layer 10."""
    parts = re.split(r"([0-9]+)", path)
    return [(-1, part) if (number := _number(part)) is None else (number, "") for part in parts]


def places(paths: Iterable[str]) -> dict[str, Place]:
    """{path: place}; modules of equal last name get the parts of their path that tell them apart."""
    split = {path: _split(path) for path in paths}
    names = _short_names({column for _, column in split.values()})
    return {path: Place(layer, names[column]) for path, (layer, column) in split.items()}


def _split(path: str) -> tuple[int | None, tuple[str, ...]]:
    parts = path.split(".")
    for i, part in enumerate(parts):
        if (number := _number(part)) is not None:
            return number, (*parts[:i], "#", *parts[i + 1 :])
    return None, tuple(parts)


def _number(part: str) -> int | None:
    """The number that a part of a path is, None for a word; what has more than 18 digits counts nothing."""
    return int(part) if re.fullmatch(r"[0-9]{1,18}", part) else None


def _short_names(columns: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    names: dict[tuple[str, ...], str] = {}
    for last in sorted({column[-1] for column in columns}):
        group = sorted(column for column in columns if column[-1] == last)
        common = set.intersection(*(set(column) for column in group))
        full = {column: _telling(column, common) for column in group}
        wordy = {column: [p for p in column[:-1] if p not in common and not p.isdigit()] for column in group}
        chosen = wordy if len({tuple(parts) for parts in wordy.values()}) == len(group) else full
        if len({tuple(parts) for parts in chosen.values()}) < len(group):
            chosen = {column: list(column[:-1]) for column in group}
        names |= {column: ".".join([*parts, last]) for column, parts in chosen.items()}
    return names


def _telling(column: tuple[str, ...], common: set[str]) -> list[str]:
    """The parts that not every column has, and before a number the word that says what is counted."""
    parts = []
    for part, following in pairwise(column):
        counted = following.isdigit() and following not in common
        if part not in common or (counted and part != "#"):
            parts.append(part)
    return parts
