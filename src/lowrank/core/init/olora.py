"""OLoRA: start from the QR decomposition of the weight."""

import torch

from lowrank.core.finite import require_finite
from lowrank.core.init.base import Site, Start


def olora(site: Site) -> Start:
    """W0 = Q·R; B = Q[:, :r], A = R[:r], subtracted again (Büyükakyüz 2024, arXiv 2406.01775)."""
    weight = site.weight()
    require_finite(weight, "W0")
    q, r = torch.linalg.qr(weight)
    return Start(
        r[: site.rank].to(site.dtype).contiguous(),
        q[:, : site.rank].to(site.dtype).contiguous(),
        subtract=True,
    )
