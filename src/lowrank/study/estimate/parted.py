"""A base in parts, one in each of several processes (`--shard`): what one of them holds, and what it gathers in use."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lowrank.errors import ConfigError
from lowrank.train.sharding import Whole, blocks_of, kept_whole


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes of a process. away: of the base, what the others hold; outside: of the matrices in no block, whole; block:
    of the largest block's, whole.
    """

    away: int
    outside: int
    block: int

    @property
    def beginning(self) -> int:
        """Gathered when a pass begins: the outside as it came and as it is laid out, and the first block as it came."""
        return 2 * self.outside + self.block

    @property
    def passing(self) -> int:
        """While blocks run, forward and backward: the outside, one block, and as it came the one before or after."""
        return self.outside + 2 * self.block


WHOLE = Parts(0, 0, 0)


def parts_of(model: nn.Module, whole: Whole, processes: int) -> Parts:
    """How `train.sharding` would deal out a model: every matrix by its rows. whole: as there.

    Raises ConfigError where no blocks are found in it.
    """
    blocks = dict(blocks_of(model))
    if not blocks:
        raise ConfigError(f"--shard: no blocks are found in a {type(model).__name__}; leave --shard out")
    kept = kept_whole(model, set(blocks), whole(model))
    matrices = [p for p in model.parameters() if p not in kept]
    inside = {path: sum(p.nbytes for p in block.parameters() if p not in kept) for path, block in blocks.items()}
    outermost = [path for path in blocks if not any(above in blocks for above in _above(path))]
    largest = max(inside[path] for path in blocks)
    away = sum(p.nbytes - math.ceil(len(p) / processes) * p[0].nbytes for p in matrices)
    return Parts(away, sum(p.nbytes for p in matrices) - sum(inside[path] for path in outermost), largest)


def _above(path: str) -> Iterator[str]:
    """The modules that a module is in."""
    return (path[:at] for at, letter in enumerate(path) if letter == ".")
