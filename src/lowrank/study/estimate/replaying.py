"""How long this processor takes for operations: each is done, on ones, and a clock looked at.

In a step a small operation mostly follows a large product, after which neither its code nor its numbers are in the
nearest caches: it takes up to three times as long as again and again by itself (measured, 256 tokens of a width of
768). So the step's own main product goes before each here. What is too long is done on tensors of shorter sides, and
counted up by its arithmetic or its bytes.
"""

import time
from collections import Counter
from statistics import median

import torch

from lowrank.stages import stage
from lowrank.study.estimate.operation import Done, Operation, Seconds

MOST_ARITHMETIC, MOST_MOVED = 4e9, 1 << 27  # of an operation that is done as it is
MOST_BEFORE = 5e8  # arithmetic of what goes before
TIMES, LONG = 3, 0.02  # how often an operation is done, and the seconds after which it is not done again
FAILS = (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError)  # what cannot be done by itself


class Replayed:
    """Called with what is done in a step: its seconds. rates: for operations that cannot be done by themselves."""

    def __init__(self, rates: Seconds) -> None:
        self.rates = rates

    def __call__(self, done: Done) -> float:
        """How long all of it takes."""
        before = _main_product(done)
        total = 0.0
        for number, (operation, times) in enumerate(done.items()):
            stage("measuring operations", number, len(done))
            total += times * self._seconds(operation, before)
        return total

    @torch.no_grad()
    def _seconds(self, operation: Operation, before: Operation | None) -> float:
        try:
            short = shortened(operation, MOST_ARITHMETIC, MOST_MOVED)
            took = _timed(short, before)
        except FAILS:
            return self.rates(Counter([operation]))
        by = operation.arithmetic / short.arithmetic if short.arithmetic else operation.moved / max(1, short.moved)
        return took * by


def _main_product(done: Done) -> Operation | None:
    """The product on which most of the arithmetic is spent, shortened; None where there is none."""
    most = max(done, key=lambda one: one.arithmetic * done[one], default=None)
    return shortened(most, MOST_BEFORE, MOST_MOVED) if most is not None and most.arithmetic else None


def shortened(operation: Operation, arithmetic: float, moved: int) -> Operation:
    """The operation, or its like of sides that were halved until it has no more of both."""
    found = operation
    while found.arithmetic > arithmetic or found.moved > moved:
        smaller = found.halved()
        if smaller is None or smaller.moved >= found.moved:
            break
        found = smaller
    return found


def _timed(operation: Operation, before: Operation | None) -> float:
    """Seconds, the median."""
    first = None if before is None else before.called_with("cpu")
    taken: list[float] = []
    while len(taken) < TIMES and sum(taken) < LONG:
        args, options = operation.called_with("cpu")
        if before is not None and first is not None:
            before.func(*first[0], **first[1])
        began = time.perf_counter()
        operation.func(*args, **options)
        taken.append(time.perf_counter() - began)
    return median(taken)
