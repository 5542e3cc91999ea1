"""Rows to tokens a part at a time, as work for the cache: what was made is written before the next part is begun."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lowrank.data.cache.rows import StoredRows
from lowrank.data.cache.tokens import token_batch, token_schema, totals
from lowrank.data.cache.warned import heard
from lowrank.data.dataset import Dataset
from lowrank.data.examples import Example
from lowrank.data.recipe import Recipe
from lowrank.data.tally import COUNTS, Tally
from lowrank.errors import DataError
from lowrank.stages import stage

Encoder = Callable[[Dataset, Any, Recipe, Tally], list[Example]]


class Encoding:
    """One pass over the rows: record batches of examples, then what is true of all of them."""

    lasting = True

    def __init__(self, data: Dataset, tokenizer: Any, recipe: Recipe, encoder: Encoder) -> None:
        self.data, self.tokenizer, self.recipe, self.encoder = data, tokenizer, recipe, encoder
        self.tally = Tally()
        self.schema = token_schema(whole=data.kind != "regression")
        self._totals: list[tuple[int, int, float, float]] = []

    def batches(self) -> Iterator[Any]:
        """The examples of every part that has any."""
        for examples, found in self._parts():
            self.tally.add(found)
            if examples:
                batch = token_batch(examples, self.schema)
                self._totals.append(totals(batch))
                yield batch

    def header(self) -> Mapping[str, Any]:
        """What is true of the examples, when all are made. Raises DataError for what is wrong with them."""
        with heard() as warned:
            self.tally.settle(self.data, self.recipe)
        if not self._totals:
            raise DataError(
                f"{self.data.path}: no row has a token to train within {self.recipe.max_length} tokens; raise "
                "--max-length, or shorten the prompts"
            )
        tokens, trained, least, largest = zip(*self._totals, strict=True)
        return {
            "counts": {name: getattr(self.tally, name) for name in COUNTS},
            "totals": [sum(tokens), sum(trained), min(least), max(largest)],
            "warned": warned,
        }

    def _parts(self) -> Iterator[tuple[list[Example], Tally]]:
        rows, done = self.data.rows, 0
        for part in rows.parts() if isinstance(rows, StoredRows) else [rows]:
            stage("tokenising rows", done, len(rows))
            found = Tally()
            yield self.encoder(replace(self.data, rows=part), self.tokenizer, self.recipe, found), found
            done += len(part)
