"""How long the step of an optimiser takes, clipping included: tried on a processor, else the bytes that it moves."""

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from lowrank.study.estimate.operation import Operation, Seconds
from lowrank.train.optimiser import Optimiser
from lowrank.train.settings import LoopSettings

PASSES = 7  # of an AdamW step over its tensors: four read, three written
MOST_NUMBERS = 1 << 22  # that are updated for it


def update_of(trained: Sequence[nn.Parameter], name: str, pace: Seconds, on: str) -> float:
    """Seconds. trained: what gets gradients, of any device; name: the optimiser's; on: "cpu" or "gpu"."""
    numbers = sum(p.numel() for p in trained)
    if on != "cpu":
        return pace(Counter([Operation(None, (), (), 0.0, PASSES * 4 * numbers)]))
    some: list[nn.Parameter] = []
    for one in trained:
        if sum(p.numel() for p in some) < MOST_NUMBERS:
            rows = max(1, MOST_NUMBERS // max(1, one[0].numel()))
            some.append(nn.Parameter(torch.ones_like(one[:rows], device="cpu")))
    return _seconds(some, name) * numbers / sum(p.numel() for p in some)


def _seconds(some: Sequence[nn.Parameter], name: str) -> float:
    """Of the second step, when the moments are there."""
    optimiser = Optimiser(some, LoopSettings.model_validate({"optimizer": name}))
    took = 0.0
    for _ in range(2):
        for parameter in some:
            parameter.grad = torch.ones_like(parameter)
        began = time.perf_counter()
        optimiser.step(1.0)
        took = time.perf_counter() - began
    return took
