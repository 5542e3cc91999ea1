"""Rows that are not as they should be: counted, the first three shown; an error, or skipped where the user says so."""

import warnings
from dataclasses import dataclass, field
from typing import Literal

from lowrank.errors import DataError, LowrankWarning

BadRows = Literal["error", "skip"]
SHOWN = 3


@dataclass(slots=True)
class Faults:
    """How many there are, and the sentences of the first of them: a file may have millions."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, sentence: str) -> None:
        """One more."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(sentence)

    def join(self, later: "Faults") -> None:
        """Those of rows that come after these."""
        self.count += later.count
        self.shown = [*self.shown, *later.shown][:SHOWN]

    def listed(self, apart: str) -> str:
        """The first ones, with a word of how many are like them."""
        more = f" and {self.count - len(self.shown):,} more like these" if self.count > len(self.shown) else ""
        return apart.join(self.shown) + more


def settle(faults: Faults, policy: BadRows, remedy: str) -> None:
    """Nothing where there are none. Raises DataError, or warns of how many rows go on without being read."""
    if not faults.count:
        return
    shown = faults.listed("; ")
    if policy == "error":
        raise DataError(f"{shown}; {remedy}")
    warnings.warn(f"{faults.count:,} bad rows are left out: {shown}", LowrankWarning, stacklevel=2)
