"""Putting the fused forward under a PEFT model's LoRA layers, and taking it away again."""

from typing import Any

from torch import nn

from lowrank.errors import TargetError
from lowrank.peft.eligibility import reason_against_kind, reason_against_tensors, reason_for_peft_path
from lowrank.peft.report import AccelerationReport, LayerPath


def accelerate(peft_model: nn.Module) -> AccelerationReport:
    """Let the LoRA layers of a PEFT model compute by the fused kernels, in place; `restore` undoes it.

    Answers and gradients are PEFT's within the rounding of the base's dtype, in the same parameters; adapters stay the
    float32 masters PEFT made them, rounded to the input's dtype where they meet it (PEFT widens the input instead).
    Whatever PEFT does beside that (other adapters, merging, `disable_adapter`, `adapter_names`, saving, deleting) goes
    on working: at each call a layer decides by its state, and hands the call to PEFT's own forward where the fused one
    would not give the same, or would be slower (inference of a few tokens). Under dropout the mask has PEFT's law but
    is another draw. Second derivatives through an accelerated layer are refused by autograd.

    The report says what each layer does in its present state. Calling again is harmless, and needed only after
    `add_adapter` has adapted further modules. Raises TargetError where the model has no LoRA layer of PEFT's.
    """
    from lowrank.peft.layer import fused_class

    layers = _lora_layers(peft_model)
    for _, layer in layers:
        if (fused := fused_class(type(layer))) is not None:
            layer.__class__ = fused
    return AccelerationReport(tuple(_path_of(name, layer) for name, layer in layers))


def restore(peft_model: nn.Module) -> int:
    """Give every accelerated layer PEFT's own class back, in place; returns how many there were."""
    accelerated: list[Any] = [module for module in peft_model.modules() if "fused_over" in vars(type(module))]
    for layer in accelerated:
        layer.__class__ = type(layer).fused_over
    return len(accelerated)


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The LoRA layers of PEFT with their paths, outer before inner."""
    from peft.tuners.lora.layer import LoraLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise TargetError(
            f"{type(model).__name__} has no LoRA layer of PEFT's: accelerate takes a model from peft.get_peft_model or "
            "PeftModel.from_pretrained with a LoraConfig (layers of lowrank.inject are fused already)"
        )
    return layers


def _path_of(name: str, layer: Any) -> LayerPath:
    return LayerPath(name, reason_against_kind(layer) or reason_for_peft_path(layer) or reason_against_tensors(layer))
