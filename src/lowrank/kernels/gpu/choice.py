"""Whether a Triton kernel computes a product: only where it has been measured faster than torch's own form.

Both forms are timed once per shape and dtype on the GPU, on tensors made for it; the process keeps the answer.
Under torch.use_deterministic_algorithms the clock decides nothing: torch's form is used.
"""

import os
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

OFF = os.environ.get("LOWRANK_TRITON") == "0"


def available(x: Tensor) -> bool:
    """True where a Triton kernel could run on x at all."""
    return x.is_cuda and not OFF and _installed() and not torch.are_deterministic_algorithms_enabled()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def product_is_faster(tokens: int, inner: int, width: int, rank: int, dtype: torch.dtype, onto: bool) -> bool:
    """Whether `gpu.product.plus_low_rank` beats a product followed by addmm_ at this shape. Tokens count in eighths of
    a power of two, so that batches of like length share a measurement."""
    return _product_ratio(_rounded(tokens), inner, width, rank, dtype, onto) < 1


def gradients_are_faster(tokens: int, width: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether `gpu.gradients.two_gradients` beats two products at this shape."""
    return _gradients_ratio(_rounded(tokens), width, rank, dtype) < 1


def _rounded(tokens: int) -> int:
    step = max(1, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


@cache
def _product_ratio(tokens: int, inner: int, width: int, rank: int, dtype: torch.dtype, onto: bool) -> float:
    from lowrank.kernels.gpu.product import plus_low_rank

    x, m, s, n = (_filled(shape, dtype) for shape in ((tokens, inner), (inner, width), (tokens, rank), (rank, width)))
    out = _filled((tokens, width), dtype)
    mine = _seconds(lambda: plus_low_rank(x, m, s, n, onto=out if onto else None))
    return mine / _seconds(lambda: (out.addmm_(x, m) if onto else x @ m).addmm_(s, n))


@cache
def _gradients_ratio(tokens: int, width: int, rank: int, dtype: torch.dtype) -> float:
    from lowrank.kernels.gpu.gradients import two_gradients

    dy, s, b = (_filled(shape, dtype) for shape in ((tokens, width), (tokens, rank), (width, rank)))
    return _seconds(lambda: two_gradients(dy, s, b)) / _seconds(lambda: (dy @ b, (s.t() @ dy).t()))


def _filled(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 0.01, dtype=dtype, device="cuda")


def _seconds(job: Callable[[], object]) -> float:
    """The best of five, after two to warm up (the first compiles)."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        job()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[2:])
