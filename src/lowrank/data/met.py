"""Rows to evaluate that are trained on too: what is measured on them is memory."""

import warnings
from dataclasses import dataclass

from lowrank.data.cache.rows import StoredRows
from lowrank.data.dataset import Dataset
from lowrank.errors import LowrankWarning, some


@dataclass(frozen=True, slots=True)
class Met:
    """source: where the rows to evaluate stand; count: how many they are; at: the places of those that were met."""

    source: str
    count: int
    at: tuple[str, ...]


def met_in_training(rows: Dataset, evaluated: Dataset) -> Met:
    """Which rows to evaluate say the same as one that is trained on, whatever their files and lines."""
    assert isinstance(rows.rows, StoredRows) and isinstance(evaluated.rows, StoredRows)
    asked = list(evaluated.rows.said())
    known = {*asked}.intersection(rows.rows.said())  # what is trained may be much: of it nothing is held
    met = tuple(evaluated.place(evaluated.rows[at]) for at, said in enumerate(asked) if said in known)
    return Met(str(evaluated.path), len(evaluated.rows), met)


def warn_of_met(rows: Dataset, evaluated: Dataset) -> None:
    """Warn (LowrankWarning) where rows to evaluate are trained on too."""
    met = met_in_training(rows, evaluated)
    if met.at:
        warnings.warn(
            f"{met.source}: {len(met.at):,} of the {met.count:,} rows to evaluate are trained on too "
            f"({some(met.at)}): what is measured on them is memory",
            LowrankWarning,
            stacklevel=2,
        )
