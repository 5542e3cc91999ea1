"""A start where A and B are both orthonormal, and still ΔW = 0."""

import torch
from torch import nn

from lowrank.core.init.base import Site, Start
from lowrank.errors import ConfigError


def orthogonal(site: Site) -> Start:
    """A = [A₁; 0] with orthonormal rows A₁, B = [0, B₂] with orthonormal columns B₂: B·A = 0 exactly. Even r only.

    The two live on orthogonal halves of the rank-r space, so both get gradients from the first step. PEFT's
    "orthogonal" turns the halves by a random rotation, after which B·A is zero only up to rounding.
    """
    if site.rank % 2:
        raise ConfigError(
            f'init_lora_weights="orthogonal" needs an even rank, not {site.rank}: choose r = {site.rank + 1}'
        )
    half = site.rank // 2
    a, b = site.zero_a(), site.zero_b()
    if site.device.type != "meta":
        a[:half] = nn.init.orthogonal_(torch.empty(half, site.k, device=site.device)).to(a.dtype)
        b[:, half:] = nn.init.orthogonal_(torch.empty(site.d, half, device=site.device)).to(b.dtype)
    return Start(a, b)
