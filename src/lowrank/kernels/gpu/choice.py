"""Whether a Triton kernel computes a product: only where it gives torch's answer and has been measured faster.

Kernel and torch's own form are run once per shape and dtype on the GPU, on random tensors made for it; the process
keeps the answer. A kernel that this GPU or this Triton cannot run, or runs wrong, is not used, and a warning says so.
Under torch.use_deterministic_algorithms the clock decides nothing: torch's form is used.
"""

import math
import os
import time
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

OFF = os.environ.get("LOWRANK_TRITON") == "0"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CLOSE = 1e-2  # a kernel's answer is torch's if it is off by no more, in norm: TF32 and half precision are well below


def available(x: Tensor) -> bool:
    """True where a Triton kernel could run on x at all."""
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and not OFF
        and _installed()
        and not torch.are_deterministic_algorithms_enabled()
    )


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def product_tile(x: Tensor, width: int, rank: int, onto: bool) -> "Tile | None":
    """The tiles with which `gpu.product.plus_low_rank` beats a product of x (T, k) followed by addmm_; None: none do.

    Tokens count in eighths of a power of two, so that batches of like length share a measurement.
    """
    return _product_tile(_rounded(x.shape[0]), x.shape[1], width, rank, x.dtype, onto, x.device)


def gradients_are_faster(dy: Tensor, rank: int) -> bool:
    """Whether `gpu.gradients.two_gradients` beats two products with dY (T, d)."""
    return _gradients_are_faster(_rounded(dy.shape[0]), dy.shape[1], rank, dy.dtype, dy.device)


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

    def torchs() -> Sequence[Tensor]:
        return [(start.clone().addmm_(x, m) if onto else x @ m).addmm_(s, n)]

    fastest = _fastest(f"x·W + S·B of {tokens}×{inner} by {inner}×{width}", list(map(kernel, TILES)), torchs, device)
    return None if fastest is None else TILES[fastest]


@cache
def _gradients_are_faster(tokens: int, width: int, rank: int, dtype: torch.dtype, device: torch.device) -> bool:
    from lowrank.kernels.gpu.gradients import two_gradients

    dy, s, b = _drawn(((tokens, width), (tokens, rank), (width, rank)), dtype, device)

    def torchs() -> Sequence[Tensor]:
        return dy @ b, (s.t() @ dy).t()

    return _fastest(f"dS and dB of {tokens}×{width}", [lambda: two_gradients(dy, s, b)], torchs, device) is not None


def _drawn(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random matrices, from a generator of their own: the user's random numbers stay what they were."""
    draw = torch.Generator(device).manual_seed(0)
    return [torch.randn(*shape, generator=draw, device=device).div_(math.sqrt(shape[0])).to(dtype) for shape in shapes]


def _fastest(
    what: str,
    kernels: Sequence[Callable[[], Sequence[Tensor]]],
    torchs: Callable[[], Sequence[Tensor]],
    device: torch.device,
) -> int | None:
    """Which of the kernels is the fastest; None where torch's form is, or no kernel gives its answer."""
    wanted, seconds, faults = torchs(), [_seconds(torchs, device)], []
    for kernel in kernels:
        try:
            off = max(
                float((one.float() - other.float()).norm() / other.float().norm())
                for one, other in zip(kernel(), wanted, strict=True)
            )
            if not off <= CLOSE:
                raise ArithmeticError(f"its answer is off by {off:.2g}")
            seconds.append(_seconds(kernel, device))
        except Exception as error:  # a GPU, a driver or a Triton that the kernel was not written for: there is torch
            faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
            seconds.append(math.inf)
    if len(faults) == len(kernels):
        message = f"the Triton kernel for {what} does not serve on {device}, torch's products are used: {faults[0]}"
        warnings.warn(message, LowrankWarning, stacklevel=2)
    best = min(range(len(seconds)), key=seconds.__getitem__)
    return best - 1 if best else None


def _seconds(job: Callable[[], object], device: torch.device) -> float:
    """The best of five, after two to warm up (the first compiles)."""
    times = []
    for _ in range(7):
        _wait(device)
        start = time.perf_counter()
        job()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
