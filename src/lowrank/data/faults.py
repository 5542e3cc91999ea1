"""Rows that are not as they should be: counted, the first three shown; an error, or skipped where the user says so."""

import warnings
from collections.abc import Sequence
from typing import Literal

from lowrank.errors import DataError, LowrankWarning

BadRows = Literal["error", "skip"]
SHOWN = 3


def settle(faults: Sequence[str], policy: BadRows, remedy: str) -> None:
    """Nothing where there are none. Raises DataError, or warns of how many rows go on without being read."""
    if not faults:
        return
    more = f" and {len(faults) - SHOWN:,} more like these" if len(faults) > SHOWN else ""
    shown = "; ".join(faults[:SHOWN]) + more
    if policy == "error":
        raise DataError(f"{shown}; {remedy}")
    warnings.warn(f"{len(faults):,} bad rows are left out: {shown}", LowrankWarning, stacklevel=2)
