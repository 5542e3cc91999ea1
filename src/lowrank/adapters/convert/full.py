"""Tensors in full from formats that only list them: which are trained biases, and which modules are saved whole."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from lowrank.checkpoint.keys import Key


class Full(NamedTuple):
    """tensors under the keys PEFT expects, modules for modules_to_save, and the config's word for bias."""

    tensors: dict[Key, Tensor]
    modules: tuple[str, ...]
    bias: str


def sort_full(tensors: Mapping[Key, Tensor], adapted: Collection[str]) -> Full:
    """Biases of adapted modules are trained biases ("lora_only"), all else belongs to modules that are saved whole."""
    sorted_tensors = {replace(key, of_base=key.path in adapted): tensor for key, tensor in tensors.items()}
    modules = tuple(sorted({key.path for key in tensors} - set(adapted)))
    biases = any(key.path in adapted and key.name == "bias" for key in tensors)
    return Full(sorted_tensors, modules, "lora_only" if biases else "none")
