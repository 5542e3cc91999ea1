"""oneDNN's float32 products, for the low-rank part and the gradients, on processors where torch's own choice is slower.

On a CPU torch multiplies float32 matrices by Intel's MKL. On AMD's processors with AVX-512 oneDNN, which torch has as
well, takes 0.83 to 0.95 of that for a layer's products, and 0.35 to 0.8 where one side is as thin as the factors
(measured on an EPYC, 1 and 2 threads). Both sum in float32, in another order. Only the low-rank part and the gradients
go this way: W0·x stays torch's own, so that an adapter with B = 0 gives the base's answer bit for bit.

oneDNN makes code for every shape that it meets, which takes 0.3 ms and keeps memory (1.2 MB each, measured; a training
on rows of all lengths grew by 400 MB in 120 steps). So only round numbers of tokens go to it, of which there are few.
"""

from functools import cache

import torch
from torch import Tensor

from lowrank.kernels.processor import has_avx512, vendor
from lowrank.kernels.rehearsal import device_type

ROWS, WIDTH = 256, 8  # below either, a call's own cost, or MKL, wins; more rows go to it by whole multiples


def serves(like: Tensor, rows: int, width: int) -> bool:
    """Whether a product of `like`'s dtype and device goes to oneDNN: over `rows` tokens, `width` its thinner side.

    `torch.backends.mkldnn.enabled = False` turns it off.
    """
    return (
        rows >= ROWS
        and rows % ROWS == 0
        and width >= WIDTH
        and like.dtype is torch.float32
        and device_type(like) == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and is_faster_here()
    )


@cache
def is_faster_here() -> bool:
    """Whether this machine is of the kind that it was measured on: AMD with AVX-512, and a torch that has MKL.

    With AVX2 alone MKL is the faster one: a step of 6×768 takes 1.16 of the floor by oneDNN and 1.08 by MKL.
    """
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return has_both and vendor() == "AuthenticAMD" and has_avx512()


def times_transposed(x: Tensor, m: Tensor) -> Tensor:
    """x·mᵀ: x (n, k), m (d, k), either of them perhaps a transposed view → (n, d)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, m, None, "none", [], "")
    return product
