"""y_e = W_e·x_e + s·B_e·A_e·x̂_e for rows that are sorted by expert, as one differentiable function.

The grouped product of the base is whoever's it is; the low-rank products go over the same groups. S = x̂·Aᵀ is kept and
dS = dY·B is formed once, for dA, dB and the input's gradient, which takes the low-rank part in place. No ΔW is formed,
and an expert without rows costs nothing: its gradients are the zeros that they are allocated as.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Product = Callable[[Tensor, Tensor], Tensor]  # (rows (T, n), stack (E, n, m)) → (T, m), group by group


def grouped_linear(
    x: Tensor, seen: Tensor, weight: Tensor, product: Product, a: Tensor, b: Tensor, scale: float, offsets: Tensor
) -> Tensor:
    """W_e·x_e + s·B_e·A_e·x̂_e: x (T, k), seen x̂ (T, k), weight (E, k, d), a (E, r, k), b (E, d, r) → (T, d).

    seen: x itself, or what dropout left of it. offsets: (E,), where each expert's rows end; rows after the last belong
    to nobody (another device has their expert), and what is answered for them means nothing. a and b are rounded to x's
    dtype. The weight gets no gradient.
    """
    if x.device.type == "cpu":
        answer: Tensor = _Grouped.apply(x, seen, weight, product, a, b, scale, offsets.tolist())  # type: ignore[no-untyped-call]
        return answer
    return product(x, weight) + grouped_low_rank(seen, a, b, scale, product)


def grouped_low_rank(seen: Tensor, a: Tensor, b: Tensor, scale: float, product: Product) -> Tensor:
    """s·B_e·A_e·x̂_e by two grouped products: seen (T, k) → (T, d); the rank is padded to what their strides want."""
    a, b = a.to(seen.dtype), b.to(seen.dtype)
    if missing := -a.shape[1] % (16 // seen.element_size()):
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return product(product(seen, a.transpose(1, 2)), b.transpose(1, 2)) * scale


def groups(ends: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, slice(start, end)
        start = end


class _Grouped(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seen: Tensor,
        weight: Tensor,
        product: Product,
        a: Tensor,
        b: Tensor,
        scale: float,
        ends: list[int],
    ) -> Tensor:
        ctx.same, ctx.masters = seen is x, (a.dtype, b.dtype)
        ctx.product, ctx.scale, ctx.ends = product, scale, ends
        seen, a, b = (tensor.to(weight.dtype) for tensor in (seen, a, b))
        y = product(x, weight)  # (T, d)
        s = seen.new_empty(seen.shape[0], a.shape[1])  # (T, r)
        with torch.autocast("cpu", enabled=False):  # as grouped products are
            for expert, rows in groups(ends):
                torch.mm(seen[rows], a[expert].t(), out=s[rows])
                y[rows].addmm_(s[rows], b[expert].t(), alpha=scale)
        ctx.save_for_backward(seen, s, weight, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seen, s, weight, a, b = ctx.saved_tensors
        dy = dy.contiguous()
        needs_x, needs_seen, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        dx = ctx.product(dy, weight.transpose(1, 2)) if needs_x else None  # (T, k)
        onto = dx if ctx.same else torch.zeros_like(seen) if needs_seen else None
        da = torch.zeros_like(a) if needs_a else None
        db = torch.zeros_like(b) if needs_b else None
        with torch.autocast("cpu", enabled=False):
            for expert, rows in groups(ctx.ends):
                if da is not None or onto is not None:
                    ds = torch.mm(dy[rows], b[expert]).mul_(ctx.scale)  # (t, r)
                    if da is not None:
                        torch.mm(ds.t(), seen[rows], out=da[expert])
                    if onto is not None:
                        onto[rows].addmm_(ds, a[expert])
                if db is not None:
                    torch.mm(dy[rows].t(), s[rows], out=db[expert]).mul_(ctx.scale)
        a_dtype, b_dtype = ctx.masters
        return (
            dx,
            None if ctx.same else onto,
            None,
            None,
            None if da is None else da.to(a_dtype),
            None if db is None else db.to(b_dtype),
            None,
            None,
        )
