"""A peer's order of products, written anew, so that orders can be compared on any machine.

Unsloth's kernels (`unsloth/kernels/fast_lora.py`, github.com/unslothai/unsloth) run on CUDA only. For one projection
they compute y = x·W0ᵀ with S·Bᵀ added in place; backward forms x·Aᵀ again and dY·B twice, once for dA and once for dX,
and adds the low-rank part of dX in place. Their functions for a whole MLP and for q, k, v together save activations and
launches beyond that, which is not rebuilt here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class _UnslothOrder(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ weight.t()
        y.addmm_(rows @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(rows, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a_master, b_master = ctx.saved_tensors
        a, b, dy = a_master.to(x.dtype), b_master.to(x.dtype), dy.reshape(-1, dy.shape[-1])
        da = torch.empty_like(a).addmm_((dy @ b).t(), x, alpha=ctx.scale, beta=0)
        db = torch.empty_like(b).addmm_(dy.t(), x @ a.t(), alpha=ctx.scale, beta=0)
        dx = (dy @ weight).addmm_(dy @ b, a, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, da.to(a_master.dtype), db.to(b_master.dtype), None


class UnslothOrder(nn.Module):
    """A Linear without bias and its adapter, in Unsloth's order: (..., k) → (..., d)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.scale = base.weight, scale
        d, k = base.weight.shape
        self.lora_A = nn.Parameter(torch.zeros(rank, k, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(d, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """W0·x + s·B·A·x."""
        y: Tensor = _UnslothOrder.apply(x, self.weight, self.lora_A, self.lora_B, self.scale)  # type: ignore[no-untyped-call]
        return y


def in_unsloths_order(model: nn.Module, targets: list[str], rank: int, scale: float) -> nn.Module:
    """In place: every target becomes an `UnslothOrder`."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in targets:
            assert isinstance(module, nn.Linear) and module.bias is None
            setattr(model.get_submodule(parent), name, UnslothOrder(module, rank, scale))
    return model
