"""Rows to evaluate that are trained on too: what is measured on them is memory."""

from dataclasses import dataclass

from lowrank.data.dataset import Dataset
from lowrank.data.rows import Row


@dataclass(frozen=True, slots=True)
class Met:
    """source: where the rows to evaluate stand; count: how many they are; at: the places of those that were met."""

    source: str
    count: int
    at: tuple[str, ...]


def met_in_training(rows: Dataset, evaluated: Dataset) -> Met:
    """Which rows to evaluate say the same as one that is trained on, whatever their files and lines."""
    known = {_said(row) for row in rows.rows}
    met = tuple(evaluated.place(row) for row in evaluated.rows if _said(row) in known)
    return Met(str(evaluated.path), len(evaluated.rows), met)


def _said(row: Row) -> int:
    """64 bits that rows share which say the same: a set of them may hold millions."""
    return hash((tuple(sorted(row.fields.items())), repr(row.chat), repr(row.rejected)))
