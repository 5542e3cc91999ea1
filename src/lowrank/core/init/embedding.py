"""The start for lookups: A zero, B Gaussian."""

import torch

from lowrank.core.init.base import Site, Start


def embedding(site: Site) -> Start:
    """A = 0 and B ~ N(0, 1), as loralib and PEFT start embeddings.

    A's columns are looked up by token, so a token that training never meets keeps a zero column and its embedding;
    with A random and B trained, every token would move with every other.
    """
    b = torch.empty(site.d, site.rank, device=site.device, dtype=site.dtype).normal_()
    return Start(site.zero_a(), b)
