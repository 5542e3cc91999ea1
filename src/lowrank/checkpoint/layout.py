"""How factors lie in a file, by layer kind: flat matrices here, PEFT's shapes there.

PEFT keeps a convolution's A as a kernel (R, in, *kernel) over all input channels and its B as a grouped 1×1 kernel
(d, R/groups, 1..). Our A is shared by the groups of a grouped convolution, (r, in/groups · kernel): there it is written
g times, once for every group's channels and zero elsewhere, so R = g·r, and alpha is g times ours for an equal scale.

A stack of experts, A (E, r, k) and B (E, d, r), is A (E·r, k), expert after expert, and B (d, r·E), in which the expert
varies fastest. Where PEFT takes a stack for the other orientation than it has (Llama 4's), its A is our Bᵀ and its B
our Aᵀ. DoRA on stacks, which PEFT has not, is written beside them as (E, d); A is then always what meets the input.
"""

import math

import torch
from torch import Tensor

from lowrank.checkpoint.keys import EMBEDDING_A, EMBEDDING_B, A, B
from lowrank.errors import CheckpointError

Shape = tuple[int, ...]
STACKS = ("experts", "transposed-experts", "swapped-experts")


def kind_in_file(kind: str, dora: bool) -> str:
    """The layer kind by which factors are written and read: with DoRA nobody takes a stack for what it is not."""
    return "transposed-experts" if dora and kind == "swapped-experts" else kind


def pair_roles(kind: str) -> tuple[str, str]:
    """The file's words for A and B of a layer kind."""
    return (EMBEDDING_A, EMBEDDING_B) if kind == "embedding" else (A, B)


def file_rank(rank: int, groups: int) -> int:
    """R, the rank that a file declares for factors of rank `rank`."""
    return rank * groups


def wanted_shapes(kind: str, weight: Shape, rank: int, groups: int = 1) -> tuple[Shape, Shape]:
    """The shapes of A and B in a file of declared `rank`, for a module of this kind with a weight of shape `weight`."""
    if kind in STACKS:
        experts, over_b, over_a = (weight[0], weight[2], weight[1]) if kind == "transposed-experts" else weight
        return (experts * rank, over_a), (over_b, experts * rank)
    if kind == "conv":
        ones = (1,) * len(weight[2:])
        return (rank, weight[1] * groups, *weight[2:]), (weight[0], rank // groups, *ones)
    d, k = (weight[1], weight[0]) if kind in ("conv1d-linear", "embedding") else (weight[0], weight[1])
    return (rank, k), (d, rank)


def to_file(kind: str, a: Tensor, b: Tensor, weight: Shape, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The file's A and B for flat factors a (R, k), b (d, R)."""
    if kind in STACKS:
        a, b = (b.mT, a.mT) if kind == "swapped-experts" else (a, b)
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    if kind != "conv":
        return a, b
    kernel = a.reshape(a.shape[0], *weight[1:])
    if groups > 1:
        kernel = _spread(kernel, groups)
    return kernel, b.reshape(*b.shape, *[1] * len(weight[2:]))


def from_file(kind: str, a: Tensor, b: Tensor, weight: Shape, where: str = "") -> tuple[Tensor, Tensor]:
    """Flat factors a (r, k), b (d, r) for the file's A and B; the inverse of `to_file`.

    Raises CheckpointError for a grouped convolution whose A mixes the channels of several groups.
    """
    if kind in STACKS:
        a, b = a.unflatten(0, (weight[0], -1)), b.unflatten(1, (-1, weight[0])).permute(2, 0, 1)
        a, b = (b.mT, a.mT) if kind == "swapped-experts" else (a, b)
        return a.contiguous(), b.contiguous()
    if kind != "conv":
        return a, b
    groups = a.shape[1] // weight[1]
    if groups == 1:
        return a.flatten(1), b.flatten(1)
    return _gather(a, b.flatten(1), groups, where)


def magnitude_shape(kind: str, weight: Shape) -> Shape:
    """The file's shape of DoRA's magnitude: (d,), (E, d), with the axes of a convolution's answer (1, d, 1...)."""
    if kind in STACKS:
        return weight[0], weight[1] if kind == "experts" else weight[2]
    if kind == "conv":
        return (1, weight[0], *[1] * len(weight[2:]))
    return (weight[1] if kind in ("conv1d-linear", "embedding") else weight[0],)


def _spread(kernel: Tensor, groups: int) -> Tensor:
    """(r, in/g, *kernel) → (g·r, in, *kernel): a copy for every group, on that group's channels."""
    rank, width = kernel.shape[:2]
    full = kernel.new_zeros(groups * rank, groups * width, *kernel.shape[2:])
    for group in range(groups):
        full[group * rank : (group + 1) * rank, group * width : (group + 1) * width] = kernel
    return full


def _gather(a: Tensor, b: Tensor, groups: int, where: str) -> tuple[Tensor, Tensor]:
    """The shared factors of a grouped convolution: A (g·r, in, *kernel), B (d, r).

    Where every group has the same A, that is it. Otherwise the A of all groups are stacked, (g·r, in/g · kernel), and
    each output row of B sees only those of its own group.
    """
    rank, width = a.shape[0] // groups, a.shape[1] // groups
    own = [a[g * rank : (g + 1) * rank, g * width : (g + 1) * width].flatten(1) for g in range(groups)]
    if sum(int(block.count_nonzero()) for block in own) != int(a.count_nonzero()):
        raise CheckpointError(
            f"{where}.lora_A mixes the channels of the convolution's {groups} groups, so its change is no kernel of "
            "the base's shape and could not be merged: train it without this layer, or with lowrank"
        )
    if all(torch.equal(block, own[0]) for block in own):
        return own[0], b
    rows = math.ceil(b.shape[0] / groups)
    return torch.cat(own), torch.block_diag(*b.split(rows))
