"""Several projections of one input as one autograd node, with the bits of a node for each.

h_i = W_i·x + bias_i + s_i·B_i·A_i·(mask∘x). The products are those of `fused`, one by one, the thin ones first; x, the
masked x and the way through Python are shared.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lowrank.core.stored import Stored
from lowrank.kernels import products
from lowrank.kernels.dropout import Mask
from lowrank.kernels.fused import beside, folds, forward_part, laid_out_as_b, seen_by_a
from lowrank.kernels.shared_input import Part, shared_input


class Group:
    """The gatherer of x's gradient that a group adds to, and the place of each call there, once it has come."""

    def __init__(self, x: Tensor) -> None:
        self.shared = shared_input(x)
        self.places: dict[int, int] = {}

    def hand_out(self, at: int) -> None:
        """The answer `at` is given to its layer now."""
        self.places[at] = self.shared.join(in_group=True)


class FusedGroup(Function):
    @staticmethod
    def forward(
        ctx: Any,
        _token: Tensor,
        x: Tensor,
        group: Group,
        scales: tuple[float, ...],
        mask: Mask | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        """`tensors`: all weights, which may be stored forms, then all biases, all A and all B."""
        n = len(scales)
        weights, biases, masters_a, masters_b = (tensors[i * n : (i + 1) * n] for i in range(4))
        ctx.group, ctx.scales = group, scales
        ctx.mask = None if mask is None else replace(mask, bits=None)
        ctx.masters = [(a.dtype, b.dtype) for a, b in zip(masters_a, masters_b, strict=True)]
        ctx.set_materialize_grads(False)
        a = [one.to(x.dtype) for one in masters_a]
        pairs = [beside(x, b, scale) for b, scale in zip(masters_b, scales, strict=True)]
        rows = x.reshape(-1, x.shape[-1])  # (T, k)
        seen = seen_by_a(rows, mask)
        s = [products.down(seen, one) for one in a]
        answers = tuple(
            forward_part(x, rows, weight, bias, one_a, b, scale, one_s, folds(rows, weight, one_a, mask))
            for weight, bias, one_a, (b, scale), one_s in zip(weights, biases, a, pairs, s, strict=True)
        )
        ctx.beside = [scale for _, scale in pairs]
        ctx.stored = [one if isinstance(one, Stored) else None for one in weights]
        numbers = [None if isinstance(one, Stored) else one for one in weights]
        ctx.save_for_backward(rows, None if mask is None else mask.bits, *s, *numbers, *a, *(b for b, _ in pairs))
        return answers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, bits, *saved = ctx.saved_tensors
        mask = None if ctx.mask is None else replace(ctx.mask, bits=bits)
        n = len(ctx.scales)
        s, weights, a, b = (saved[i * n : (i + 1) * n] for i in range(4))
        *_, needs_bias, needs_a, needs_b = (ctx.needs_input_grad[5:][i * n : (i + 1) * n] for i in range(4))
        grads: list[list[Tensor | None]] = [[None] * n for _ in range(4)]  # of weights, biases, a and b
        places, shared = ctx.group.places, ctx.group.shared
        live = {i: dh.reshape(-1, dh.shape[-1]) for i in places if (dh := dhs[i]) is not None}  # (T, d)
        ds = {}  # (T, r)
        for i, dh in live.items():
            ds[i], dbt = products.two_gradients(dh, s[i], b[i], ctx.beside[i], needs_b[i])
            grads[3][i] = None if dbt is None else laid_out_as_b(dbt, ctx.scales[i], ctx.masters[i][1])
            grads[1][i] = dh.sum(0) if needs_bias[i] else None
        seen = seen_by_a(rows, mask) if any(needs_a[i] for i in live) else rows
        for i, one in ds.items():
            grads[2][i] = products.weight_gradient(one, seen).to(ctx.masters[i][0]) if needs_a[i] else None
        if shared.needs_gradient:
            frozen = [stored or weight for stored, weight in zip(ctx.stored, weights, strict=True)]
            parts = {places[i]: Part(dh, frozen[i], ds[i], a[i], mask) for i, dh in live.items()}
            shared.add(parts, places.values())
        return None, None, None, None, None, *grads[0], *grads[1], *grads[2], *grads[3]
