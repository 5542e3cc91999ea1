"""A loss as a sum with its count, so that batches of any size can be put together without bias."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lowrank.data.batches import Batch


@dataclass(frozen=True, slots=True)
class Loss:
    """total: the sum over what is trained, in float32 or wider and differentiable; count: how many that are.

    tallies: sums of what is counted beside it, by name, which add up over batches; rows: figures of each row, by name,
    (rows, ...), which are put one behind the other.
    """

    total: Tensor
    count: int
    tallies: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


LossOf = Callable[[nn.Module, Batch], Loss]
