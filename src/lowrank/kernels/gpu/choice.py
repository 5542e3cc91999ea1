"""Whether a Triton kernel computes a product, and by which tiles: by rule, and only where it gives torch's answer.

A clock would make two runs from one seed differ, so none is asked. The GPUs on which the kernels were measured to be
faster than torch's products are in `MEASURED`: none yet. LOWRANK_TRITON=1 asks for them on any GPU, LOWRANK_TRITON=0
turns them off. Kernel and torch's own form are run once per shape and dtype, on random tensors made for it; a kernel
that this GPU or this Triton cannot run, or runs wrong, is not used, and a warning says so.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank.errors import LowrankWarning

if TYPE_CHECKING:
    from lowrank.kernels.gpu.product import Tile

ASKED = os.environ.get("LOWRANK_TRITON")
MEASURED: frozenset[str] = frozenset()  # names of GPUs, as torch.cuda.get_device_name has them
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CLOSE = 1e-2  # a kernel's answer is torch's if it is off by no more, in norm: TF32 and half precision are well below


def available(x: Tensor) -> bool:
    """True where a Triton kernel could compute a product of x."""
    return x.is_cuda and x.dtype in DTYPES and _wanted(x.device) and _installed()


@cache
def _wanted(device: torch.device) -> bool:
    return ASKED == "1" or (ASKED != "0" and torch.cuda.get_device_name(device) in MEASURED)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def product_tile(x: Tensor, width: int, rank: int, onto: bool) -> "Tile | None":
    """The tiles by which `gpu.product.plus_low_rank` computes a product of x (T, k), (T, width); None: torch does.

    The first of `TILES` that the output fills and the kernel serves with. Tokens count in eighths of a power of two, so
    that batches of like length share a trial.
    """
    return _product_tile(_rounded(x.shape[0]), x.shape[1], width, rank, x.dtype, onto, x.device)


def serves_gradients(dy: Tensor, rank: int) -> bool:
    """Whether `gpu.gradients.two_gradients` gives torch's two products with dY (T, d)."""
    return _serves_gradients(_rounded(dy.shape[0]), dy.shape[1], rank, dy.dtype, dy.device)


def _rounded(tokens: int) -> int:
    step = max(1, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


@cache
def _product_tile(
    tokens: int, inner: int, width: int, rank: int, dtype: torch.dtype, onto: bool, device: torch.device
) -> "Tile | None":
    from lowrank.kernels.gpu.product import TILES, Tile, plus_low_rank

    x, m, s, n, start = _drawn(
        ((tokens, inner), (inner, width), (tokens, rank), (rank, width), (tokens, width)), dtype, device
    )

    def kernel(tile: Tile) -> Callable[[], Sequence[Tensor]]:
        return lambda: [plus_low_rank(x, m, s, n, onto=start.clone() if onto else None, tile=tile)]

    wanted = [(start.clone().addmm_(x, m) if onto else x @ m).addmm_(s, n)]
    fitting = [tile for tile in TILES if tile.tokens <= tokens and tile.width <= width] or list(TILES[-1:])
    first = _first_that_serves(
        f"x·W + S·B of {tokens}×{inner} by {inner}×{width}", list(map(kernel, fitting)), wanted, device
    )
    return None if first is None else fitting[first]


@cache
def _serves_gradients(tokens: int, width: int, rank: int, dtype: torch.dtype, device: torch.device) -> bool:
    from lowrank.kernels.gpu.gradients import two_gradients

    dy, s, b = _drawn(((tokens, width), (tokens, rank), (width, rank)), dtype, device)
    wanted, what = (dy @ b, (s.t() @ dy).t()), f"dS and dB of {tokens}×{width}"
    return _first_that_serves(what, [lambda: two_gradients(dy, s, b)], wanted, device) is not None


def _drawn(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random matrices, from a generator of their own: the user's random numbers stay what they were."""
    draw = torch.Generator(device).manual_seed(0)
    return [torch.randn(*shape, generator=draw, device=device).div_(math.sqrt(shape[0])).to(dtype) for shape in shapes]


def _first_that_serves(
    what: str, kernels: Sequence[Callable[[], Sequence[Tensor]]], wanted: Sequence[Tensor], device: torch.device
) -> int | None:
    """The first of the kernels that gives torch's answer; None where none does, which is said."""
    faults = []
    for i, kernel in enumerate(kernels):
        try:
            off = max(
                float((one.float() - other.float()).norm() / other.float().norm())
                for one, other in zip(kernel(), wanted, strict=True)
            )
            if not off <= CLOSE:
                raise ArithmeticError(f"its answer is off by {off:.2g}")
            return i
        except Exception as error:  # a GPU, a driver or a Triton that the kernel was not written for: there is torch
            faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
    message = f"the Triton kernel for {what} does not serve on {device}, torch's products are used: {faults[0]}"
    warnings.warn(message, LowrankWarning, stacklevel=2)
    return None
