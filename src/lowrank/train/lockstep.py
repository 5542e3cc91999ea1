"""Processes that hold a part of the base each run every forward together: who has fewer rows runs idle ones."""

import math

from torch import nn

from lowrank.train.processes import count, number
from lowrank.train.sharding import is_in_parts


def idle_passes(model: nn.Module, items: int, size: int = 1) -> int:
    """How many passes this process lacks to as many as the first one has, which has the most.

    items: dealt out one by one (`processes.share`), `size` in a pass. 0 where every process holds the whole model.
    """
    if not is_in_parts(model):
        return 0
    own = len(range(number(), items, count()))
    return math.ceil(math.ceil(items / count()) / size) - math.ceil(own / size)
