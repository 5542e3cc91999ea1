"""Products of stacked experts in a rehearsal: without numbers nobody knows how many rows an expert gets.

Each gets as many here, and such a product is looked at as the batched one of the same size. Torch's own kernel for
tensors without numbers knows bfloat16 alone, and its table of arithmetic does not know the product.
"""

from typing import Any

import torch
from torch import Tensor

GROUPED = torch.ops.aten._grouped_mm.default
BATCHED = torch.ops.aten.bmm.default


def even_batches(x: Tensor, y: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """The factors, (E, m, k) and (E, k, n), of the batched product that is as large as the grouped one x·y.

    x·y: (T, k)·(E, k, n) for the rows of E experts, (m, T)·(T, n) for the gradient of their weights.
    """
    if x.dim() == y.dim() == 3:
        return x, y
    experts = y.shape[0] if y.dim() == 3 else x.shape[0] if x.dim() == 3 else 0 if offs is None else offs.shape[0]
    if y.dim() == 3:
        return x.new_empty(experts, _each(x.shape[0], experts), x.shape[1]), y
    if x.dim() == 3:
        return x, y.new_empty(experts, y.shape[0], _each(y.shape[1], experts))
    each = _each(x.shape[1], experts)
    return x.new_empty(experts, x.shape[0], each), y.new_empty(experts, each, y.shape[1])


def grouped_answer(x: Tensor, y: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What the grouped product answers with: (T, n), or (E, m, n) for the gradient of weights."""
    if x.dim() == y.dim():
        one, other = even_batches(x, y, offs)
        return x.new_empty(one.shape[0], one.shape[1], other.shape[2])
    return x.new_empty(x.shape[-2], y.shape[-1])


def _each(rows: int, experts: int) -> int:
    return -(-rows // experts)
