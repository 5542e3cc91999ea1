"""Which rows of the data an example was made from, as file:line."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowrank.data.dataset import Dataset
from lowrank.data.packing import Packs
from lowrank.data.recipe import Recipe
from lowrank.data.tokens import Encoded, encode
from lowrank.errors import DataError

MOST = 100_000  # rows that are looked through


class Places:
    """Of one data set. Most rows become one example each; where some were left out or split, rows are encoded again."""

    def __init__(self, rows: Dataset, data: Encoded, tokenizer: Any, recipe: Recipe) -> None:
        self.rows, self.data, self.tokenizer, self.recipe = rows, data, tokenizer, recipe

    def __call__(self, examples: Sequence[int]) -> list[str]:
        """The places of the rows in these examples, packs taken apart; none where the data is too long to look."""
        found = self.data.examples
        if isinstance(found, Packs):
            examples = [row for pack in examples for row in found.members[pack]]
        if not (self.data.dropped or self.data.split or self.data.rewritten):
            return [self.rows.place(self.rows.rows[number]) for number in examples]
        return [self.rows.place(self.rows.rows[row]) for row in self._search(sorted(examples))]

    def _search(self, examples: Sequence[int]) -> list[int]:
        """The row of every example, by making rows into examples until all are found."""
        wanted, found, made = list(examples), [], 0
        for row in range(min(len(self.rows.rows), MOST)):
            if not wanted:
                break
            made += self._count(row)
            while wanted and wanted[0] < made:
                found.append(row)
                wanted.pop(0)
        return found

    def _count(self, row: int) -> int:
        try:
            alone = replace(self.rows.choose([row]), key="")  # not to be kept on disk
            with warnings.catch_warnings(action="ignore"):
                return len(encode(alone, self.tokenizer, self.recipe).examples)
        except DataError:  # nothing of it is trained
            return 0
