"""Steps of AdamW on float32 numbers, whatever dtype the trained tensors have."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import nn

from lowrank.core.factors import LoraFactors
from lowrank.train.adamw import made
from lowrank.train.settings import LoopSettings


def factors_b(model: nn.Module) -> list[nn.Parameter]:
    """The B of every adapter that is trained."""
    return [m.b for m in model.modules() if isinstance(m, LoraFactors) and m.b.requires_grad]


class Optimiser:
    """AdamW over the tensors that require gradients.

    A tensor of a narrower dtype (a head saved in full beside a bfloat16 base) has a float32 master that the steps go to
    and that it is rounded from: a step is mostly smaller than half a bfloat16 unit, and would be lost.

    faster: those that are trained at `lr_ratio` times the rate, the B of every layer (LoRA+, arXiv 2402.12354: with
    one rate for both, B learns too slowly in wide models).
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], settings: LoopSettings, faster: Collection[nn.Parameter] = ()
    ) -> None:
        self.parameters = list(parameters)
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self.rate = settings.rate
        self.clip = settings.clip
        fast = {id(parameter) for parameter in faster} if settings.lr_ratio != 1 else set()
        pairs = list(zip(self.parameters, self.masters, strict=True))
        groups = [
            {"params": [m for p, m in pairs if id(p) not in fast], "share": 1.0},
            {"params": [m for p, m in pairs if id(p) in fast], "share": settings.lr_ratio},
        ]
        self.adamw = made(settings.optimizer, [group for group in groups if group["params"]], settings)

    def step(self, factor: float) -> float:
        """In place: one step at `factor` of the highest rate, and the gradients are cleared.

        Returns the gradient's norm before clipping. With a norm that is not finite nothing is changed.
        """
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf))
        if math.isfinite(norm):
            self._update(factor)
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    @torch.no_grad()
    def _update(self, factor: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = self.rate * group["share"] * factor
        narrow = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        for parameter, master in narrow:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.adamw.step()
        for parameter, master in narrow:
            parameter.copy_(master)
