"""A layer's half-precision products in pieces, for shapes at which the library would leave cores idle.

On a CPU torch multiplies half-precision matrices by oneDNN, which deals a product out to its threads by blocks that it
chooses itself. For some shapes it finds one block only: 1,024×768 by 768×768 takes as long on two cores as on one. As
two products of half the rows, or as blocks of columns, it uses both (measured: 1.7× as fast, on a Xeon with AMX).

No rule says for which shapes this is so: a shape that is met again and again is timed, once, whole and in pieces. The
clock decides nothing that can be seen, though: pieces are used only where their answer has the bits of the whole
product's, which the order of its sums, and so the shape, determines. LOWRANK_PIECES=0 turns them off.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MEETINGS = 12  # a shape is worth timing once it was met so often: the timing costs about as much as it can bring in
SMALLEST = 1 << 27  # multiplications in a product; below, a second call costs what the second core saves
CLEARLY = 0.8  # pieces are used below this share of the whole's time
COLUMNS = 256
ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Cut:
    """Pieces of a product's output along dimension `dim`, of `size` each, in `share` of the whole product's time."""

    dim: int
    size: int
    share: float

    def __str__(self) -> str:
        """As a person reads it."""
        return f"in pieces of {self.size} {('rows', 'columns')[self.dim]}, {self.share:.2f} of the whole's time"


class Shape(NamedTuple):
    """What decides how oneDNN deals out x·m: x (tokens, k), m (k, d), and how it ends."""

    tokens: int
    k: int
    d: int
    transposed: bool  # m is a transposed view
    bias: bool
    onto: bool
    dtype: torch.dtype
    threads: int


_known: dict[Shape, int | Cut | None] = {}  # how often a shape was met, then what was found
_off = os.environ.get("LOWRANK_PIECES") == "0"


def base(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """W0·x + bias, into `out` where given: x (..., k), weight (d, k), bias (d,), out (..., d); the bits of F.linear."""
    cut = _cut_of(x, weight.t(), bias is not None, False)
    if cut is None and out is None:
        return F.linear(x, weight, bias)
    h = x.new_empty(*x.shape[:-1], weight.shape[0]) if out is None else out
    rows = x.reshape(-1, x.shape[-1])
    # where torch cannot see x as one matrix it adds the bias to the rounded product
    apart = bias is not None and x.dim() > 2 and not x.is_contiguous()
    whole = Cut(0, max(1, rows.shape[0]), 1.0)
    _in_pieces(rows, weight.t(), None if apart else bias, h.view(-1, weight.shape[0]), cut or whole)
    return h.add_(bias) if apart and bias is not None else h


def product(x: Tensor, m: Tensor, onto: Tensor | None = None) -> Tensor:
    """x·m, added in place to `onto` where given: x (T, k), m (k, d) → (T, d)."""
    cut = _cut_of(x, m, False, onto is not None)
    if cut is None:
        return torch.mm(x, m) if onto is None else onto.addmm_(x, m)
    if onto is None:
        return _in_pieces(x, m, None, x.new_empty(x.shape[0], m.shape[1]), cut)
    return _onto_in_pieces(x, m, onto, cut)


def _cut_of(x: Tensor, m: Tensor, bias: bool, onto: bool) -> Cut | None:
    """How x·m is cut: not at all until its shape has been met often enough to be timed."""
    if x.dtype.itemsize != 2 or x.device.type != "cpu" or _off:
        return None
    k, d = m.shape
    tokens = x.numel() // k
    if tokens * k * d < SMALLEST:
        return None
    shape = Shape(tokens, k, d, m.stride(0) < m.stride(1), bias, onto, x.dtype, torch.get_num_threads())
    known = _known.get(shape, 0)
    if isinstance(known, int):
        known = known + 1 if known < MEETINGS else find_cut(shape)
        _known[shape] = known
    return known if isinstance(known, Cut) else None


@cache
def explain(tokens: int, k: int, d: int, dtype: torch.dtype) -> str:
    """How W0·x is cut for x (tokens, k) and W0 (d, k) on this CPU, measured now; empty where it is computed whole."""
    if dtype.itemsize != 2 or tokens * k * d < SMALLEST or _off:
        return ""
    cut = find_cut(Shape(tokens, k, d, True, False, False, dtype, torch.get_num_threads()))
    return "" if cut is None else f"W0·x {cut}"


def find_cut(shape: Shape) -> Cut | None:
    """The fastest pieces for a shape that have the whole's bits and are clearly faster than it; None: whole is best."""
    if shape.threads == 1 or not torch.backends.mkldnn.is_available():
        return None
    draw = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(shape.dtype)

    x, bias = drawn(shape.tokens, shape.k), drawn(shape.d) if shape.bias else None
    m = drawn(shape.d, shape.k).t() if shape.transposed else drawn(shape.k, shape.d)
    start = drawn(shape.tokens, shape.d) if shape.onto else None

    def whole() -> Tensor:
        return F.linear(x, m.t(), bias) if start is None else start.clone().addmm_(x, m)

    def pieces(cut: Cut) -> Callable[[], Tensor]:
        if start is None:
            return lambda: _in_pieces(x, m, bias, x.new_empty(shape.tokens, shape.d), cut)
        return lambda: _onto_in_pieces(x, m, start.clone(), cut)

    wanted = whole()
    half = (-(-shape.tokens // 2), -(-shape.d // 2 // 64) * 64)
    tried = dict.fromkeys((Cut(0, half[0], 0.0), Cut(1, half[1], 0.0), Cut(1, COLUMNS, 0.0)))
    equal = [cut for cut in tried if cut.size < (shape.tokens, shape.d)[cut.dim] and torch.equal(pieces(cut)(), wanted)]
    if not equal:
        return None
    seconds = _seconds([whole, *map(pieces, equal)])
    fastest = min(range(len(equal)), key=lambda i: seconds[1 + i])
    share = seconds[1 + fastest] / seconds[0]
    return replace(equal[fastest], share=share) if share < CLEARLY else None


def _in_pieces(x: Tensor, m: Tensor, bias: Tensor | None, out: Tensor, cut: Cut) -> Tensor:
    """x·m + bias into `out`, piece by piece: x (T, k), m (k, d), bias (d,), out (T, d)."""
    for x_part, m_part, bias_part, target in _parts(x, m, bias, out, cut):
        if bias_part is None:
            torch.mm(x_part, m_part, out=target)
        else:
            torch.addmm(bias_part, x_part, m_part, out=target)
    return out


def _onto_in_pieces(x: Tensor, m: Tensor, onto: Tensor, cut: Cut) -> Tensor:
    """onto += x·m, piece by piece: x (T, k), m (k, d), onto (T, d)."""
    for x_part, m_part, _, target in _parts(x, m, None, onto, cut):
        target.addmm_(x_part, m_part)
    return onto


def _parts(
    x: Tensor, m: Tensor, bias: Tensor | None, out: Tensor, cut: Cut
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    if cut.dim == 0:
        return [(xs, m, bias, target) for xs, target in zip(x.split(cut.size), out.split(cut.size), strict=True)]
    columns, targets = m.split(cut.size, 1), out.split(cut.size, 1)
    biases = [None] * len(columns) if bias is None else bias.split(cut.size)
    return [(x, ms, bs, target) for ms, bs, target in zip(columns, biases, targets, strict=True)]


def _seconds(jobs: list[Callable[[], Tensor]]) -> list[float]:
    """The best of some rounds for each job; they take turns."""
    best = [float("inf")] * len(jobs)
    for _ in range(ROUNDS):
        for i, job in enumerate(jobs):
            started = time.perf_counter()
            job()
            best[i] = min(best[i], time.perf_counter() - started)
    return best
