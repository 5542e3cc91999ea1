"""oneDNN's float32 products, for the low-rank part and the gradients, on processors where torch's own choice is slower.

On a CPU torch multiplies float32 matrices by Intel's MKL. On AMD's processors oneDNN, which torch has as well, takes
0.83 to 0.95 of that for a layer's products, and 0.35 to 0.8 where one side is as thin as the factors (measured on an
EPYC with AVX-512, 1 and 2 threads). Both sum in float32, in another order. Only the low-rank part and the gradients go
this way: W0·x stays torch's own, so that an adapter with B = 0 gives the base's answer bit for bit. Which products go
where depends on shape, dtype and processor alone, never on a clock, so one seed gives the same bits every time.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROWS, WIDTH = 256, 8  # below either, a call's own cost, or MKL, wins


def serves(like: Tensor, rows: int, width: int) -> bool:
    """Whether a product of `like`'s dtype and device goes to oneDNN: over `rows` tokens, `width` its thinner side.

    `torch.backends.mkldnn.enabled = False` turns it off.
    """
    return (
        rows >= ROWS
        and width >= WIDTH
        and like.dtype is torch.float32
        and like.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and is_faster_here()
    )


@cache
def is_faster_here() -> bool:
    """Whether this machine is of the kind that it was measured on: an AMD processor, on which torch has MKL."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """The processor's maker as Linux tells it, empty where nothing does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def times_transposed(x: Tensor, m: Tensor) -> Tensor:
    """x·mᵀ: x (n, k), m (d, k), either of them perhaps a transposed view → (n, d)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, m, None, "none", [], "")
    return product
