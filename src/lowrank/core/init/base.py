"""What an initialisation is given and what it answers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Site(NamedTuple):
    """Where factors will go: W0 ∈ R^{d×k}, rank r, scale s. `weight()` gives W0 widened, (d, k), when asked."""

    d: int
    k: int
    rank: int
    scale: float
    weight: Callable[[], Tensor]
    device: torch.device
    dtype: torch.dtype

    def empty_a(self) -> Tensor:
        """An unfilled A: (r, k)."""
        return torch.empty(self.rank, self.k, device=self.device, dtype=self.dtype)

    def normal_a(self, std: float) -> Tensor:
        """A ~ N(0, std²): (r, k). On the meta device there are no values to draw, and pretending to is slow."""
        a = self.empty_a()
        return a if a.is_meta else a.normal_(std=std)

    def uniform_a(self, bound: float) -> Tensor:
        """A ~ U(-bound, bound): (r, k)."""
        a = self.empty_a()
        return a if a.is_meta else a.uniform_(-bound, bound)

    def zero_a(self) -> Tensor:
        """A = 0: (r, k)."""
        return torch.zeros(self.rank, self.k, device=self.device, dtype=self.dtype)

    def zero_b(self) -> Tensor:
        """B = 0: (d, r)."""
        return torch.zeros(self.d, self.rank, device=self.device, dtype=self.dtype)


class Start(NamedTuple):
    """The factors at step 0. `subtract` says that B·A is a part of W0 and must be taken off again (PiSSA, OLoRA)."""

    a: Tensor
    b: Tensor
    subtract: bool = False
