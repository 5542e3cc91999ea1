"""dX of all projections that read one input: Σ dY·W0 in place, and the low-rank parts of all as one product."""

import torch
from torch import Tensor

from lowrank.core.stored import Weight, dense
from lowrank.kernels.dropout import Mask
from lowrank.kernels.products import add_product_, are_widened, input_gradient, one_kernel


class InputGradient:
    """dX, (T, k), gathered projection by projection: each adds dY·W0, and mask∘(dS·A) waits for those to come.

    Parts that went through one mask, or none, are stacked: mask∘([dS₁ dS₂ …]·[A₁; A₂; …]).
    """

    def __init__(self) -> None:
        self._dx: Tensor | None = None
        self._parts: dict[int | None, tuple[Mask | None, list[tuple[Tensor, Tensor]]]] = {}  # by the mask's seed

    def add(self, dy: Tensor, weight: Weight, ds: Tensor, a: Tensor, mask: Mask | None) -> None:
        """dX += dY·W0 + mask∘(dS·A): dy (T, d), weight (d, k), ds (T, r), a (r, k)."""
        matrix = dense(weight, dy.dtype)
        kernel = one_kernel(dy, matrix, a.shape[0], onto=self._dx is not None) if mask is None else None
        if kernel is not None:
            self._dx = kernel(dy, matrix, ds, a, onto=self._dx)
            return
        self._dx = input_gradient(dy, matrix, onto=self._dx)
        _, parts = self._parts.setdefault(None if mask is None else mask.seed, (mask, []))
        parts.append((ds, a))

    def total(self) -> Tensor | None:
        """dX with all low-rank parts; None where nothing was added."""
        dx = self._dx
        if dx is None:
            return None
        for mask, parts in self._parts.values():
            stacked, a = parts[0]
            if len(parts) > 1:
                stacked, a = torch.cat([ds for ds, _ in parts], dim=1), torch.cat([a for _, a in parts])
            if mask is None:
                add_product_(dx, stacked, a)
            elif are_widened(dx):
                mask.add_product_(dx, stacked.float(), a.float())
            else:
                mask.add_product_(dx, stacked, a)
        return dx
