"""Rows to tokens a part at a time, as work for the cache: what was made is written before the next part is begun."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from lowrank.data.cache.rows import StoredRows
from lowrank.data.cache.tokens import token_batch, token_schema, totals
from lowrank.data.cache.warned import heard
from lowrank.data.dataset import Dataset
from lowrank.data.examples import Example
from lowrank.data.forked import in_order, useful
from lowrank.data.recipe import Recipe
from lowrank.data.rows import JUDGES, Row
from lowrank.data.tally import COUNTS, Tally
from lowrank.errors import DataError
from lowrank.stages import stage

STAGE = "tokenising rows"
THREADS = 2  # one is in Python while the other's texts are with the tokenizer, which has all cores: more gain nothing
WORTH = 4  # parts that a process should have to do
Made = tuple[Any, Tally]  # a record batch of examples, None for none; what was found on the way
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
        for batch, found in self._made():
            self.tally.add(found)
            if batch is not None:
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

    def _made(self) -> Iterator[Made]:
        """Every part in order, some on their way at once: what they become does not depend on each other."""
        rows = self.data.rows
        parts: Sequence[Sequence[Row]] = rows.parts() if isinstance(rows, StoredRows) else [rows]
        done = 0
        for part, made in zip(parts, self._run(parts), strict=True):
            yield made
            done += len(part)
            stage(STAGE, done, len(rows))

    def _run(self, parts: Sequence[Sequence[Row]]) -> Iterator[Made]:
        """By processes where a template writes many rows, since one process runs one at a time; else by threads."""
        processes = min(useful(), len(parts) // WORTH) if self.data.speaks else 1
        if processes > 1:
            yield from in_order(lambda number: self._part(parts[number]), len(parts), processes)
            return
        waiting: deque[Future[Made]] = deque()
        pool = ThreadPoolExecutor(self._threads(), "tokens")
        try:
            for part in parts:
                waiting.append(pool.submit(self._part, part))
                if len(waiting) > THREADS:
                    yield waiting.popleft().result()
            yield from (made.result() for made in waiting)
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
        finally:  # nobody who wants to leave waits for a part: a template may have no end
            pool.shutdown(wait=False, cancel_futures=True)

    def _part(self, rows: Sequence[Row]) -> Made:
        found = Tally()
        examples = self.encoder(replace(self.data, rows=list(rows)), self.tokenizer, self.recipe, found)
        return token_batch(examples, self.schema) if examples else None, found

    def _threads(self) -> int:
        """One where the tokenizer is told something else between its calls: to cut, for rows with a label; or is not
        known to bear several at once. It is told to cut nothing here, before any thread asks it."""
        if self.data.kind in JUDGES or not getattr(self.tokenizer, "is_fast", False):
            return 1
        self.tokenizer("a", add_special_tokens=False)
        return THREADS
