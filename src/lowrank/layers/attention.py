"""nn.MultiheadAttention, whose q, k and v projections are one matrix that no module holds."""

from typing import Any

from torch import Tensor, nn

from lowrank.layers.base import LoraLayer
from lowrank.layers.reading import AdaptedWeight


class LoraAttention(LoraLayer):
    """torch's attention with W0 + Σ s·B·A in the place of W0 = in_proj_weight, (3·E, E): its q, k and v projections.

    Its forward, torch's fast path in eval() included, computes with the matrix that it reads: formed once a call, and
    differentiable in the factors. Dropout has no x to drop entries of here: said. `out_proj` is a layer of its own.
    """

    kind = "attention"
    weight_name = "in_proj_weight"
    in_proj_weight = AdaptedWeight()

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        """With widths of their own, q, k and v are three parameters."""
        if module._parameters.get("in_proj_weight") is None:
            return "its keys or values have another width (kdim, vdim), so its q, k and v are no one matrix"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The plain class's answer on W0 + Σ ΔW."""
        return self.adapted_forward(*args, **kwargs) if self.active_factors else self.base_forward(*args, **kwargs)
