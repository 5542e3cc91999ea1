"""Fastfood: a random projection R^d → R^D that is never stored, for measuring a task's intrinsic dimension.

Sources: Le, Sarlós, Smola 2013 (the transform); Li et al. 2018, arXiv 1804.08838, §S7, and Aghajanyan et al. 2020,
arXiv 2012.13255, §3 (its use for θ = θ0 + P·θ_d).
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

DENSE = 64  # columns of the small Hadamard matrices that a large one is multiplied out from: one pass over x for each
CHUNK = 2**22  # numbers of the result that are in work at a time


@lru_cache(maxsize=8)
def _hadamard(n: int) -> Tensor:
    """(n, n) of ±1, symmetric: H(1) = 1, H(2n) = [[H, H], [H, −H]]."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def walsh_hadamard(x: Tensor) -> Tensor:
    """H·x / √n over the last dimension, n = x.shape[-1] a power of two: O(n log n), orthonormal, its own inverse.

    H(n) is the Kronecker product of small Hadamard matrices, one matrix product each.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"the last dimension must be a power of two, not {n}")
    shape, done = x.shape, 1
    while done < n:
        factor = min(DENSE, n // done)
        small = _hadamard(factor).to(x)
        x = x.reshape(-1, factor) @ small if done == 1 else small @ x.reshape(-1, factor, done)
        done *= factor
    return x.reshape(shape) / math.sqrt(n)


class Fastfood:
    """P (D, d) as blocks of H·G·Π·H·B, scaled so that E‖P·u‖² = ‖u‖² (its columns have unit norm on average).

    B: random signs; Π: a permutation; G: standard Gaussian; H: the orthonormal Walsh-Hadamard matrix, each of width n,
    the least power of two that is at least d. ⌈D/n⌉ blocks lie below each other; the last is cut off at D. Only
    B, Π and G are held, O(D) numbers, and the seed alone makes them again. O(D log n) time.
    """

    def __init__(self, d: int, dimensions: int, seed: int) -> None:
        """d, dimensions: the columns and rows of P. Raises ValueError unless 1 ≤ d ≤ dimensions."""
        if not 1 <= d <= dimensions:
            raise ValueError(f"a subspace must have between 1 and {dimensions} dimensions, not {d}")
        self.d, self.dimensions = d, dimensions
        self.width = 1 << (d - 1).bit_length()
        self.blocks = -(-dimensions // self.width)
        random = torch.Generator().manual_seed(seed)
        shape = (self.blocks, self.width)
        self._signs = torch.randint(0, 2, shape, generator=random, dtype=torch.int8).mul_(2).sub_(1)
        self._order = torch.empty(shape, dtype=torch.int32)
        for rows in self._chunks():
            self._order[rows] = torch.rand(self._order[rows].shape, generator=random).argsort(-1).int()
        self._gauss = torch.randn(shape, generator=random)
        self._scale = math.sqrt(self.width / dimensions)

    def _chunks(self) -> list[slice]:
        step = max(1, CHUNK // self.width)
        return [slice(start, min(start + step, self.blocks)) for start in range(0, self.blocks, step)]

    def times(self, u: Tensor) -> Tensor:
        """P·u (D,) for u (d,)."""
        padded = torch.nn.functional.pad(u, (0, self.width - self.d))
        result = u.new_empty(self.blocks, self.width)
        for rows in self._chunks():
            mixed = walsh_hadamard(self._signs[rows].to(u) * padded)
            mixed = mixed.gather(-1, self._order[rows].to(u.device, torch.int64))
            result[rows] = walsh_hadamard(mixed.mul_(self._gauss[rows].to(u)))
        return result.view(-1)[: self.dimensions].mul_(self._scale)

    def transposed_times(self, v: Tensor) -> Tensor:
        """Pᵀ·v (d,) for v (D,): the adjoint, ⟨P·u, v⟩ = ⟨u, Pᵀ·v⟩."""
        total = v.new_zeros(self.width)
        for rows in self._chunks():
            first, last = rows.start * self.width, min(rows.stop * self.width, self.dimensions)
            part = torch.nn.functional.pad(v[first:last], (0, rows.stop * self.width - last)).view(-1, self.width)
            mixed = walsh_hadamard(part).mul_(self._gauss[rows].to(v))
            order = self._order[rows].to(v.device, torch.int64)
            mixed = torch.empty_like(mixed).scatter_(-1, order, mixed)
            total += (walsh_hadamard(mixed) * self._signs[rows].to(v)).sum(0)
        return total[: self.d].mul_(self._scale)

    def __call__(self, u: Tensor) -> Tensor:
        """P·u, differentiable in u."""
        result: Tensor = _Project.apply(u, self)  # type: ignore[no-untyped-call]
        return result


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, projection: Fastfood) -> Tensor:
        ctx.projection = projection
        return projection.times(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.projection.transposed_times(grads[0].contiguous()), None
