"""LoftQ: start from what quantising took off the weight (Li et al. 2023, arXiv 2310.08659)."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank.core.merging import Change, merge_weight
from lowrank.core.stored import Stored, requantise

EXACT = 2048  # up to this side the decomposition is whole; noise has a flat spectrum, which sketches see badly
ITERATIONS = 8


def loftq(residual: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B) with s·B·A the best rank-r part of W0 − Q(W0), (d, k) in float32: A (r, k), B (d, r)."""
    if min(residual.shape) <= EXACT:
        u, sigma, vh = torch.linalg.svd(residual, full_matrices=False)
    else:
        u, sigma, v = torch.svd_lowrank(residual, q=min(2 * rank, *residual.shape), niter=ITERATIONS)
        vh = v.t()
    root = (sigma[:rank] / scale).sqrt()
    return (root.unsqueeze(1) * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def taken_off(
    weight: Tensor, rank: int, scale: float, rounds: int, held: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(A, s·B) that the paper takes off W0 before its last of `rounds` > 1 quantises: the factors of the round before.

    weight: W0, (d, k) in float32; held: Q of a matrix.
    """
    target = weight
    for _ in range(rounds - 1):
        a, b = loftq(weight - held(target), rank, scale)
        off = a, b * scale
        target = torch.addmm(weight, off[1], a, alpha=-1)
    return off


def moved(weight: Tensor, held: Stored, off: tuple[Tensor, Tensor]) -> Stored:
    """Q(W0 − B·A), which the further rounds freeze: weight W0 (d, k), off (A, s·B), held: a weight of the form."""
    a, b = off
    return requantise(merge_weight(weight.float(), (Change(b.to(a.dtype), a, -1.0),)), held)
