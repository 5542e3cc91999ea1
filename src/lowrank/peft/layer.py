"""PEFT's LoRA Linear with the fused forward. Importing this file imports peft: do it inside functions."""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from lowrank.kernels.autocast import under_autocast
from lowrank.kernels.fused import reason_against, stacked
from lowrank.kernels.order import FEW_TOKENS
from lowrank.kernels.together import Operands, projection
from lowrank.peft.eligibility import active_names, base_matrix, dropout_of, reason_against_dtype, reason_for_peft_path


class FusedLinear(Linear):  # type: ignore[misc]  # peft has no types
    """h = W0·x + bias + Σ s·B·A·dropout(x) over the active adapters: x (..., k) → (..., d), in the base's dtype.

    Only the forward differs from PEFT's layer, and only where that gives the same; every other call is PEFT's.
    """

    accelerated = True

    def _get_name(self) -> str:
        """The name it prints under: PEFT's."""
        return str(Linear.__name__)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The fused answer, or PEFT's where the arguments, the layer's state or the tensors ask for it."""
        h = None if args or kwargs or _is_traced() or _is_decoding(self, x) else _fused(self, x)
        # named, not super(): a wrapper that kept this method still reaches PEFT's after the layer was restored
        answer: Tensor = Linear.forward(self, x, *args, **kwargs) if h is None else h
        return answer

    def operands(self) -> Operands | None:
        """What the layer would be computed from now, where another may compute it ahead: one adapter, no dropout."""
        if type(self) is not FusedLinear or reason_for_peft_path(self) is not None:
            return None
        names = active_names(self)
        if len(names) != 1 or dropout_of(self, names[0]) or type(self.base_layer) is not nn.Linear:
            return None
        (name,), base = names, self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return (
            None if reason_against_dtype(base.weight, a) else Operands(base.weight, base.bias, a, b, self.scaling[name])
        )


def _is_traced() -> bool:
    """True where a compiler records plain operations, to fuse them in its own way."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _is_decoding(layer: Any, x: Tensor) -> bool:
    """True for a few tokens in inference: nothing is kept for backward, and PEFT's thin products are the faster ones.

    On CPU a bfloat16 product with so few rows takes several times as long as PEFT's float32 one (13 µs against 2 µs at
    k = 768; `benchmarks/decoding.py` compares whole models).
    """
    return not layer.training and not torch.is_grad_enabled() and x.numel() < FEW_TOKENS * layer.in_features


def _fused(layer: Any, x: Tensor) -> Tensor | None:
    """The answer by the fused function, or None where PEFT must give it."""
    if type(layer) is not FusedLinear or reason_for_peft_path(layer) is not None:
        return None
    names = active_names(layer)
    a, b, scale = stacked([(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in names])
    x = under_autocast(x)
    weight, bias = base_matrix(layer)
    if reason_against(x, weight, bias) is not None or reason_against_dtype(x, a) is not None:
        return None
    own = Operands(weight, bias, a, b, scale, dropout_of(layer, names[0]))
    return projection(layer, x, own, share_mask=False)  # PEFT's layers draw a mask each
