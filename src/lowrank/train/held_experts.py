"""Stacks of experts that are put into four or eight bits as they are read, so that one of them at a time is dense.

bitsandbytes' quantisers in transformers see Linear layers alone. Ours, made of them and registered under names of their
own, see stacks too: transformers' loader gives them each stack as soon as its last expert has been read.
"""

from functools import cache
from typing import Any

from torch import nn

from lowrank.core.stored.stack import HeldStack
from lowrank.injection.quantise import left_out, quantised_stack
from lowrank.layers.experts import STACKS, hold_stored, stores_transposed
from lowrank.train.settings import HeldSettings

READ = "_lowrank_read"  # a module's {parameter: what is held of it}, until the model is whole
METHODS = {"bitsandbytes_4bit": "lowrank_4bit", "bitsandbytes_8bit": "lowrank_8bit"}  # transformers' name, and ours


def with_experts(config: Any, settings: HeldSettings, skip: tuple[str, ...]) -> Any:
    """transformers' config for bitsandbytes, under which stacks are quantised too. skip: names of what is not."""
    _register()
    config.quant_method = METHODS["bitsandbytes_8bit" if settings.quantise == "int8" else "bitsandbytes_4bit"]
    config.lowrank = (settings.quantise, settings.double, skip)
    return config


def hold_experts(model: nn.Module) -> None:
    """In place: the loaded model's stacks are held in the form that they were put into."""
    for module in list(model.modules()):
        read: dict[str, HeldStack] = module.__dict__.pop(READ, {})
        for name, stack in read.items():
            hold_stored(module, name, stack)


class WithExperts:
    """What a quantiser of transformers does beside its own: stacks of experts."""

    quantization_config: Any

    def param_needs_quantization(self, model: Any, param_name: str, **others: Any) -> bool:
        """Whether the parameter is such a stack, or one that the plain quantiser takes."""
        skip = self.quantization_config.lowrank[2]
        own: bool = super().param_needs_quantization(model, param_name, **others)  # type: ignore[misc]
        return own or (_experts(model, param_name) is not None and not left_out(param_name, skip))

    def get_quantize_ops(self) -> "Quantise":
        """What quantises a parameter."""
        return Quantise(super().get_quantize_ops(), *self.quantization_config.lowrank[:2])  # type: ignore[misc]


class Quantise:
    """One parameter, read to its end, in a stored form."""

    def __init__(self, plain: Any, scheme: Any, double: bool) -> None:
        self.plain, self.scheme, self.double = plain, scheme, double

    def convert(self, input_dict: dict[str, Any], model: Any = None, **others: Any) -> dict[str, Any]:
        """{its name: what the module holds}."""
        ((name, value),) = input_dict.items()
        experts = _experts(model, name)
        if experts is None:
            converted: dict[str, Any] = self.plain.convert(input_dict, model=model, **others)
            return converted
        parameter, weight = name.rpartition(".")[2], value[0] if isinstance(value, list) else value
        held = quantised_stack(experts, parameter, weight, self.scheme, self.double)
        experts.__dict__.setdefault(READ, {})[parameter] = held
        return {name: nn.Parameter(held.packed, requires_grad=False)}


def _experts(model: Any, name: str) -> nn.Module | None:
    """The module of experts whose stack this parameter is."""
    path, _, parameter = name.rpartition(".")
    if parameter not in STACKS:
        return None
    module: nn.Module = model.get_submodule(path)
    return None if stores_transposed(module) is None else module


@cache
def _register() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer

    for method, name in METHODS.items():
        plain = AUTO_QUANTIZER_MAPPING[method]
        register_quantizer(name)(type(f"{plain.__name__}WithExperts", (WithExperts, plain), {}))
