"""Products with one expert after another; so it goes over a stack in a stored form: each is read, used and let go.

Whichever way a forward goes over the experts (grouped, a matrix for each row, all at once), only those that tokens were
sent to are read, one at a time, once forward and once backward; nothing dense is kept between.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank.core.dora import rescaled, rescaled_change
from lowrank.core.stored import Stored, Weight
from lowrank.core.stored.stack import StoredStack
from lowrank.kernels.autocast import under_autocast
from lowrank.kernels.frozen import frozen_linear
from lowrank.kernels.fused import fused_linear, reason_against
from lowrank.kernels.grouped import groups
from lowrank.kernels.reference import low_rank
from lowrank.layers.expert_pairs import Pair, first_goes_with_base

Product = Callable[[Tensor, Stored, int], Tensor]  # (rows (..., k), W_e (d, k), e) → (..., d)


def one_expert(input: Tensor, weight: Weight, bias: Tensor | None, pairs: list[Pair], expert: int) -> Tensor:
    """W_e·x + bias and the pairs' changes: input (..., k), weight (d, k), a tensor or what reads it → (..., d)."""
    x, others = under_autocast(input), pairs
    if pairs and not pairs[0].dropout and first_goes_with_base(pairs) and reason_against(x, weight, bias) is None:
        first, *others = pairs
        h = base = fused_linear(x, weight, bias, *first.of_expert[expert], first.scale)
        if first.gains is not None:
            return rescaled(h, first.gains.of(expert), bias)
    else:
        h = base = frozen_linear(input, weight, bias) if isinstance(weight, Stored) else F.linear(input, weight, bias)
    for pair in others:
        change = low_rank(pair.dropped(input), *pair.of_expert[expert], pair.scale)
        h = h + (change if pair.gains is None else rescaled_change(base, change, pair.gains.of(expert), bias))
    return h


def sorted_rows(x: Tensor, offsets: Tensor, stack: StoredStack, product: Product) -> Tensor:
    """x (T, k), sorted by expert, offsets (E,) where each one's rows end → (T, d); zeros after the last one's."""
    ends = _ends(len(x), len(offsets)) if offsets.is_meta else offsets.tolist()
    parts = [product(x[rows], stack.of_expert(expert), expert) for expert, rows in groups(ends)]
    done = sum(part.shape[0] for part in parts)
    if done < x.shape[0] or not parts:
        width = stack.shape[2 if stack.transposed else 1]
        parts.append(x.new_zeros(x.shape[0] - done, *x.shape[1:-1], width, dtype=parts[0].dtype if parts else x.dtype))
    return torch.cat(parts)


def chosen_rows(x: Tensor, ids: Tensor, stack: StoredStack, product: Product) -> Tensor:
    """x (S, n, k), for each of S the expert in ids (S,) → (S, n, d)."""
    order = ids.argsort(stable=True)
    ends = torch.bincount(ids, minlength=stack.shape[0]).cumsum(0)
    return sorted_rows(x[order], ends, stack, product)[order.argsort()]


def all_experts(x: Tensor, stack: StoredStack, product: Product) -> Tensor:
    """x (E, n, k), rows for every expert → (E, n, d)."""
    return torch.stack([product(rows, stack.of_expert(expert), expert) for expert, rows in enumerate(x.unbind())])


def _ends(rows: int, experts: int) -> list[int]:
    """Where each expert's rows end where they are in equal shares: a rehearsal without numbers knows no more."""
    return [rows * (expert + 1) // experts for expert in range(experts)]
