"""PiSSA: start from the principal singular directions of the weight (Meng et al. 2024, arXiv 2404.02948)."""

import math

import torch
from torch import Tensor

from lowrank.core.finite import require_finite
from lowrank.core.init.base import Site, Start

OVERSAMPLING = 10


def _split(u: Tensor, sigma: Tensor, v: Tensor, site: Site) -> Start:
    if site.scale == 0:
        raise FloatingPointError("PiSSA gives s·B·A a part of W0, which no factors do at a scale s of 0")
    root = (sigma / abs(site.scale)).sqrt()
    a, b = root.unsqueeze(1) * v.t(), u * root * math.copysign(1, site.scale)
    return Start(a.to(site.dtype).contiguous(), b.to(site.dtype).contiguous(), subtract=True)


def pissa(site: Site) -> Start:
    """W0 = U·Σ·Vᵀ; B = ±U_r·√(Σ_r/|s|), A = √(Σ_r/|s|)·V_rᵀ, so s·B·A is W0's best rank-r part, subtracted again."""
    weight = site.weight()
    require_finite(weight, "W0")
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    return _split(u[:, : site.rank], sigma[: site.rank], vh[: site.rank].t(), site)


def fast_pissa(site: Site, iterations: int) -> Start:
    """PiSSA by a randomised SVD with `iterations` power iterations (Halko et al. 2011): O(d·k·r) instead of O(d·k²).

    What the sketch misses costs nothing in exactness: whatever B·A is, it is subtracted again.
    """
    width = min(site.rank + OVERSAMPLING, site.d, site.k)
    weight = site.weight()
    require_finite(weight, "W0")
    u, sigma, v = torch.svd_lowrank(weight, q=width, niter=iterations)
    return _split(u[:, : site.rank], sigma[: site.rank], v[:, : site.rank], site)
