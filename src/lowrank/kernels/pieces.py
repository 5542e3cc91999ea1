"""A layer's half-precision products in pieces, for shapes at which the library would leave cores idle.

On a CPU torch multiplies half-precision matrices by oneDNN, which deals a product out to its threads by blocks that it
chooses itself. For some shapes it finds one block only: 1,024×768 by 768×768 takes as long on two cores as on one. As
two products of half the rows it uses both (measured: 1.7× as fast, on a Xeon with AMX).

The shapes are those where that was measured (`MEASURED`), on processors of that kind. Whether the pieces make up the
whole, bit for bit, is tried when a shape is met first, on numbers that are always the same, laid out as the operands
are: where they do not, the product stays whole, so that W0·x is the base's. LOWRANK_PIECES=0 turns pieces off, and
LOWRANK_PIECES=1 tries halves at every shape of that size, on any processor.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank.kernels.processor import has_matrix_tiles
from lowrank.kernels.rehearsal import device_type

SMALLEST = 1 << 27  # multiplications in a product; below, a second call costs what the second core saves


class Cut(NamedTuple):
    """Pieces of a product's output along dimension `dim`, of `size` each."""

    dim: int
    size: int

    def __str__(self) -> str:
        """As a person reads it."""
        return f"in pieces of {self.size} {('rows', 'columns')[self.dim]}"


class Shape(NamedTuple):
    """What decides how oneDNN deals out x·m: x (tokens, k), m (k, d), how they lie in memory, and how it ends."""

    tokens: int
    k: int
    d: int
    strides: tuple[tuple[int, ...], tuple[int, ...]]  # of x and m
    bias: bool
    onto: bool
    dtype: torch.dtype
    threads: int


# on a Xeon with AMX, two threads: (tokens, k, d)
MEASURED = {(1024, 768, 768): Cut(0, 512)}

_asked = os.environ.get("LOWRANK_PIECES")


def base(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """W0·x + bias, into `out` where given: x (..., k), weight (d, k), bias (d,), out (..., d); the bits of F.linear."""
    cut = _cut_of(x, weight.t(), bias is not None, False)
    if cut is None and out is None:
        return F.linear(x, weight, bias)
    h = x.new_empty(*x.shape[:-1], weight.shape[0]) if out is None else out
    rows = x.reshape(-1, x.shape[-1])
    # where torch cannot see x as one matrix it adds the bias to the rounded product
    apart = bias is not None and x.dim() > 2 and not x.is_contiguous()
    whole = Cut(0, max(1, rows.shape[0]))
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
    """How x·m is cut, x (..., k) and m (k, d); None: it stays whole."""
    if x.dtype.itemsize != 2 or device_type(x) != "cpu":
        return None
    k, d = m.shape
    threads = torch.get_num_threads()
    if _rule(x.numel() // k, k, d, x.dtype, threads) is None:
        return None
    rows = x.reshape(-1, k)
    return tried(Shape(rows.shape[0], k, d, (rows.stride(), m.stride()), bias, onto, x.dtype, threads))


def explain(tokens: int, k: int, d: int, dtype: torch.dtype) -> str:
    """How W0·x is cut for x (tokens, k) and W0 (d, k) on this CPU; empty where it is computed whole."""
    threads = torch.get_num_threads()
    if dtype.itemsize != 2 or _rule(tokens, k, d, dtype, threads) is None:
        return ""
    cut = tried(Shape(tokens, k, d, ((k, 1), (1, k)), False, False, dtype, threads))
    return "" if cut is None else f"W0·x {cut}"


def _rule(tokens: int, k: int, d: int, dtype: torch.dtype, threads: int) -> Cut | None:
    """The pieces that were faster at this shape where they were measured, before it is known that they fit."""
    if _asked == "0" or threads == 1 or tokens * k * d < SMALLEST:
        return None
    if _asked == "1":
        return Cut(0, -(-tokens // 2))
    return MEASURED.get((tokens, k, d)) if threads == 2 and dtype is torch.bfloat16 and has_matrix_tiles() else None


@cache
def tried(shape: Shape) -> Cut | None:
    """The rule's pieces, where they give the whole's bits on numbers drawn from a seed; else None."""
    tokens, k, d, (x_stride, m_stride), *_ = shape
    cut = _rule(tokens, k, d, shape.dtype, shape.threads)
    if cut is None or 0 in x_stride + m_stride or not torch.backends.mkldnn.is_available():
        return None
    draw = torch.Generator().manual_seed(0)

    def drawn(size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        empty = torch.empty_strided(size, stride, dtype=shape.dtype, device="cpu")
        return empty.copy_(torch.randn(size, generator=draw, device="cpu"))

    x, m, start = drawn((tokens, k), x_stride), drawn((k, d), m_stride), drawn((tokens, d), (d, 1))
    bias = start[0].clone() if shape.bias else None
    if shape.onto:
        return cut if torch.equal(_onto_in_pieces(x, m, start.clone(), cut), start.addmm_(x, m)) else None
    whole = F.linear(x, m.t(), bias)
    return cut if torch.equal(_in_pieces(x, m, bias, start, cut), whole) else None


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
