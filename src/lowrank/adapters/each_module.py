"""One job for every module of an adapter, on all cores: many small matrices at once gain more than one split up."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from lowrank.core.finite import named
from lowrank.modelfiles.pool import core_count, run_tasks

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # (modules done, modules in all)


def silent(_done: int, _count: int) -> None:
    """No progress shown."""


def for_each(items: Sequence[Item], job: Callable[[Item], Result], progress: Progress = silent) -> list[Result]:
    """[job(item) for item in items], in that order, with one thread a core; the first exception ends all.

    Raises MergeError, with the item's name in it, where its numbers are not fit for what the job computes.
    """
    results: dict[int, Result] = {}
    lock = threading.Lock()

    def work(task: tuple[int, Item]) -> None:
        number, item = task
        with named(str(item)):
            result = job(item)
        with lock:
            results[number] = result
            progress(len(results), len(items))

    run_tasks(enumerate(items), lambda: work, max(1, min(core_count(), len(items))))
    return [results[number] for number in range(len(items))]


@contextmanager
def one_core_each() -> Iterator[None]:
    """As a decorator: torch splits no operation over cores meanwhile.

    Thousands of operations on small matrices would wait for each other's threads far longer than they compute, above
    all on a machine that is busy with something else.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def module_seed(seed: int, path: str) -> int:
    """A seed of its own for every module, whatever its place among them."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:6], "little")
