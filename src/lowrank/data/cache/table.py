"""Which record batch a row of a table is in."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any


class Table:
    """Record batches, one behind the other."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.starts: list[int] = [0, *accumulate(batch.num_rows for batch in batches)]

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, row: int) -> tuple[Any, int]:
        """(its batch, its place in it). Raises IndexError."""
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(row)
        at = bisect_right(self.starts, row) - 1
        return self.batches[at], row - self.starts[at]
