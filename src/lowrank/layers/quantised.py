"""Adapted linear maps whose W0 is stored in another form than numbers: four bits, int8, FP8."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.core.merging import adapted_weight
from lowrank.core.stored import Stored, Weight
from lowrank.core.stored.of_module import is_stored, stored_weight
from lowrank.errors import TargetError
from lowrank.kernels.autocast import cast_once
from lowrank.kernels.frozen import frozen_linear
from lowrank.layers.linear import LoraLinear
from lowrank.layers.overrides import overrides_of


class PackedWeight:
    """The `weight` of such a module's class, whoever asks: packed numbers, with which nobody else computes."""

    def __get__(self, layer: Any, owner: type) -> Any:
        """The parameter that the module holds."""
        return self if layer is None else layer._parameters["weight"]


class LoraQuantised(LoraLinear):
    """h = W0·x + bias + Σ s·B·A·dropout(x), W0 read from its stored form for each product and let go after it.

    The plain class's own forward is not used, with active adapters or without: bitsandbytes' layers compute in bfloat16
    on some processors, and their int8 layers round x to eight bits. Where the class has a dtype to compute in
    (`compute_dtype`), x is cast to it, and the answer back.
    """

    weight = PackedWeight()
    compute_dtype: torch.dtype | None

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        """Why its stored form cannot be read, or None."""
        try:
            stored_weight(module)
        except TargetError as error:
            return str(error)
        return None

    @classmethod
    def frozen(cls, module: nn.Module) -> Weight:
        """What reads W0, or its dense stand-in while the layer is folded."""
        if is_stored(module):
            return stored_weight(module)
        weight = module._parameters["weight"]
        assert weight is not None
        return weight

    @classmethod
    def dense(cls, module: nn.Module) -> Tensor:
        """W0 as numbers, (d, k), in the dtype of the form's own package."""
        weight = cls.frozen(module)
        return weight.matrix() if isinstance(weight, Stored) else weight.detach()

    def is_needed(self) -> bool:
        """Where an adapter owns the weight in full, as numbers."""
        overrides = overrides_of(self)
        return overrides is not None and any("weight" in names for names in overrides.owners.values())

    def held(self) -> Weight:
        """W0, or what reads it."""
        return self.frozen(self)

    def adapted_weight(self) -> Tensor:
        """W0 + Σ ΔW over the active adapters, differentiable in the factors, in the dtype of `dense`."""
        return adapted_weight(self.dense(self), self.active_factors, transposed=False)

    def forward(self, input: Tensor) -> Tensor:
        """The base's answer plus every active adapter's change, in the input's dtype."""
        dtype = getattr(self, "compute_dtype", None)
        if dtype is None or dtype is input.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return super().forward(cast_once(input, dtype)).to(input.dtype)

    def base_forward(self, input: Tensor) -> Tensor:
        """W0·x + bias."""
        weight = self.frozen(self)
        if isinstance(weight, Stored):
            return frozen_linear(input, weight, self.bias)
        return F.linear(input, weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))

    def reason_for_plain_path(self) -> str | None:
        """Why the active adapters are computed by plain operations: their own reasons, not the plain class's."""
        return self.reason_against_adapters()
