"""A quantised layer that becomes the plain one it was made from, the same module object; or holds other numbers."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.core.stored.of_module import forget_read, stored_weight
from lowrank.layers.base import LoraLayer, extend, lora_mixin, restore
from lowrank.layers.experts import hold_numbers, hold_stored
from lowrank.layers.linear import LoraConv1D, LoraLinear
from lowrank.layers.quantised import LoraQuantised
from lowrank.layers.stack import ExpertStack, LoraStack

# what the classes that are read here keep beside weight and bias, and a Linear has not
OWN = (
    "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu", "source_cls",
    "_lowrank_repacks", "state", "index", "block_size", "activation_scheme", "has_bias",
)  # fmt: skip
OWN_TENSORS = ("weight_scale_inv", "activation_scale")


def is_quantised(layer: nn.Module) -> bool:
    """Whether an adapted layer's W0 is in a stored form; or is numbers for the moment, where its class reads one."""
    return isinstance(layer, LoraQuantised) or (isinstance(layer, LoraStack) and layer.stored_stack is not None)


def become_plain(module: nn.Module, weight: Tensor) -> None:
    """In place: a linear layer or a stack of experts that was in a stored form holds `weight`, as `dense` gives it."""
    if isinstance(module, ExpertStack):
        hold_numbers(module.experts, module.parameter, weight)
    else:
        become_linear(module, weight)


def become_linear(module: nn.Module, weight: Tensor) -> None:
    """In place: `module` is a Linear (GPT-2's Conv1D where it was made from one) that holds `weight`, (d, k).

    Adapters that it has stay, with the same factors.
    """
    adapters = _take_off(module) if isinstance(module, LoraLayer) else None
    conv1d = was_conv1d(module)
    for name in OWN:
        module.__dict__.pop(name, None)
    for name in OWN_TENSORS:
        module._parameters.pop(name, None)
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if _is_foreign(hook)]:
        del hooks[key]
    module._parameters["weight"] = nn.Parameter(weight.t().contiguous() if conv1d else weight, requires_grad=False)
    if module._parameters.get("bias") is not None:
        module._parameters["bias"] = nn.Parameter(module._parameters["bias"].detach().to(weight.dtype), False)  # type: ignore[union-attr]
    module.__class__ = _conv1d(module) if conv1d else nn.Linear
    if adapters is not None:
        names, active, factors = adapters
        layer = extend(module, LoraConv1D if conv1d else LoraLinear)
        for name in names:
            layer.add_factors(name, factors[name])
        layer.activate(active)


def was_conv1d(module: nn.Module) -> bool:
    """Whether a quantised layer was made from a Conv1D, which stores W0ᵀ where this holds W0."""
    return getattr(getattr(module, "source_cls", None), "__name__", None) == "Conv1D"


def _take_off(layer: LoraLayer) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """In place: the layer is plain; (its adapters, the active ones, their factors)."""
    assert lora_mixin(layer) is LoraQuantised
    held = layer.adapter_names, layer.active_adapters, {name: layer.factors(name) for name in layer.adapter_names}
    restore(layer)
    return held


def _conv1d(module: Any) -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    module.nx, module.nf = module.__dict__.pop("in_features"), module.__dict__.pop("out_features")
    return cast(type[nn.Module], Conv1D)


def _is_foreign(hook: Any) -> bool:
    made_by = getattr(getattr(hook, "hook", hook), "__module__", "") or ""
    return made_by.startswith("bitsandbytes")


def put_stored(module: Any, weight: Any) -> None:
    """In place: the module's weight holds `weight`, a form of the class that it has (bitsandbytes' four bits, int8)."""
    if isinstance(module, ExpertStack):
        hold_stored(module.experts, module.parameter, weight)
        return
    held = module._parameters["weight"]
    if (state := getattr(held, "quant_state", None)) is not None:
        held.data = weight.packed.view(held.dtype).view(held.shape)
        nested = getattr(weight.absmax, "absmax", None)
        state.absmax = weight.absmax if nested is None else nested
        if nested is not None:
            state.offset, state.state2.absmax = weight.absmax.offset, weight.absmax.scales
    elif held.dtype is torch.int8:
        held.data = weight.numbers
        held.SCB = weight.absmax
        if hasattr(held, "CB") and held.CB is not None:
            held.CB = held.data
        if module.state.SCB is not None:
            module.state.SCB, module.state.CB = weight.absmax, held.data
    else:
        held.data, module.weight_scale_inv.data = weight.numbers, weight.scales.view_as(module.weight_scale_inv)
    forget_read(module)
    stored_weight(module)
