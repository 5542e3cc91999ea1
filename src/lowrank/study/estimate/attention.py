"""Attention as it is held where it is computed in pieces (flash): the answer and a number a row, never all scores.

On the meta device torch would take the plain form, which keeps rows × heads × length² scores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lowrank.study.estimate.counting import Counting
from lowrank.study.estimate.operation import ATTENTION, ATTENTION_BACKWARD, noted
from lowrank.train.row_attention import is_widened


@contextmanager
def in_pieces(counting: Counting, on: str) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` of torch's is the stand-in, and its work is counted.

    on: "cpu" or "gpu"; a CPU computes attention with dropout in the plain form, and so does the meta device.
    """
    plain = F.scaled_dot_product_attention

    def stand_in(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any
    ) -> Tensor:
        if dropout_p > 0 and on == "cpu":
            return plain(query, key, value, attn_mask, dropout_p, **options)
        alone = on != "cpu" or attn_mask is not None or len(query) == 1  # else rows lie end to end, as in a training
        given = [query, key, value]
        if not alone and is_widened(query.dtype, query.shape[2]):
            given = [tensor.float() for tensor in given]
        answer: Tensor = _Attention.apply(*given, counting)  # type: ignore[no-untyped-call]
        return answer.to(query.dtype)

    F.scaled_dot_product_attention = stand_in  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class _Attention(Function):
    """q (rows, heads, length, d), k and v with as many heads or fewer → (rows, heads, length, d)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, counting: Counting) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)  # laid out as its reader wants it
        sums = query.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.counting = counting
        counting.done[noted(ATTENTION, (query, key, value, 0.0, True), {}, out)] += 1
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        given = (gradient, query, key, value, out, sums, 0.0, True)
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        ctx.counting.done[noted(ATTENTION_BACKWARD, given, {}, found)] += 1
        return *found, None
