"""When the fused forward gives what PEFT's LoRA layer would, and why not otherwise.

`reason_for_peft_path` is asked at every call, since PEFT changes a layer's state at any time: it must stay cheap.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lowrank.core.stored import Weight
from lowrank.core.stored.of_module import is_readable, is_stored, stored_weight
from lowrank.kernels.fused import reason_against


def reason_against_kind(layer: Any) -> str | None:
    """Why this kind of LoRA layer is never accelerated, or None where it has been: a class can have `accelerated`."""
    if getattr(type(layer), "accelerated", False):
        return None
    return f"{type(layer).__name__} layers (over {type(layer.get_base_layer()).__name__}) have a forward of their own"


def reason_against_tensors(layer: Any) -> str | None:
    """Why the layer's tensors keep it with PEFT, supposing an input of the weight's own dtype."""
    weight, bias = base_matrix(layer)
    x = torch.empty(0, dtype=weight.dtype, device=weight.device)
    reasons = [reason_against_dtype(x, layer.lora_A[name].weight) for name in active_names(layer)]
    return reason_against(x, weight, bias) or next(filter(None, reasons), None)


def reason_for_peft_path(layer: Any) -> str | None:
    """Why PEFT's own forward must answer in the layer's present state, or None where the fused one gives the same."""
    if "forward" in layer.__dict__:
        return "its forward was replaced on the object"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    names = active_names(layer)
    if not names:
        return "none of its adapters is active"
    reason = _reason_against_base(layer.base_layer)
    for name in names:
        reason = reason or _reason_against_adapter(layer, name)
    if reason is None and len(names) > 1 and any(dropout_of(layer, name) for name in names):
        return "each of its active adapters draws a dropout mask of its own"
    return reason


def reason_against_dtype(x: Tensor, a: Tensor) -> str | None:
    """Why A may not be rounded to x's dtype: PEFT's wide path keeps float16 from underflow, except under autocast."""
    if type(a) not in (Tensor, nn.Parameter):
        return f"its factors are of a class of their own ({type(a).__name__})"
    if x.dtype is torch.float16 and a.dtype is not torch.float16 and not torch.is_autocast_enabled(x.device.type):
        return "float16 gradients would underflow where PEFT's do not"
    return None


def active_names(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def dropout_of(layer: Any, name: str) -> float:
    """The probability that the adapter's dropout drops an entry now."""
    dropout = layer.lora_dropout[name]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def base_matrix(layer: Any) -> tuple[Weight, Tensor | None]:
    """(W0 as (d, k), bias) of the base: a view or what reads it, never a copy."""
    base = layer.base_layer
    if is_stored(base):
        return stored_weight(base), base.bias
    return (base.weight if type(base) is nn.Linear else base.weight.t()), base.bias


@functools.cache
def _plain_bases() -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, Conv1D


def _reason_against_base(base: nn.Module) -> str | None:
    if is_stored(base):
        if not is_readable(base):
            return f"its base layer is a {type(base).__name__} whose weight cannot be read as it is"
    elif type(base) not in _plain_bases():
        return f"its base layer is a {type(base).__name__}"
    if _is_watched(base):
        return "its base layer has hooks"
    return None


def _reason_against_adapter(layer: Any, name: str) -> str | None:
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"adapter {name!r} is a variant ({type(variant).__name__})"
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or type(dropout) not in (nn.Identity, nn.Dropout):
        return f"adapter {name!r} is made of {type(a).__name__}, {type(b).__name__} and {type(dropout).__name__}"
    if b.bias is not None or a.bias is not None:
        return f"adapter {name!r} has a bias of its own (lora_bias)"
    if not layer.cast_input_dtype_enabled:
        return "casting the input is switched off"
    if _is_watched(a) or _is_watched(b) or _is_watched(dropout):
        return f"adapter {name!r} has hooks"
    return None


def _is_watched(module: nn.Module) -> bool:
    """True where calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )
