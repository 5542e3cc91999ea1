"""Dropping entries at random and enlarging the others, so that the expectation stays (DARE)."""

import torch
from torch import Tensor

from lowrank.core.combination.rowwise import Thin


def drop(density: float, seed: int) -> Thin:
    """A `Thin` that keeps each entry with probability `density` and divides what is kept by it: E[thin(x)] = x."""

    def thin(which: int, block: Tensor, first_row: int) -> Tensor:
        return torch.where(kept(block.shape, density, seed, which, first_row), block / density, 0)

    return thin


def kept(shape: torch.Size, density: float, seed: int, which: int, first_row: int) -> Tensor:
    """The mask of a block: a stream of random numbers for each term and first row, so every pass sees the same."""
    stream = (seed * 1_000_003 + which) * 1_000_003 + first_row
    generator = torch.Generator().manual_seed(stream % 2**63)
    return torch.rand(shape, generator=generator) < density
