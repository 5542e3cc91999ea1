"""Whether a loaded adapter changes the model's answers at all."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lowrank.core.dora import row_norms
from lowrank.core.factors import LoraFactors
from lowrank.injection.adapters import lora_layers, row_layers
from lowrank.layers.base import LoraLayer
from lowrank.layers.overrides import BASE, Overrides, override_tensors, overrides_of


def base_tensor(module: nn.Module, name: str) -> Tensor:
    """The base's own tensor of this name, whether an adapter's has taken its place or not."""
    overrides, key = overrides_of(module), Overrides.key(BASE, name)
    waiting = getattr(overrides, key, None) if overrides is not None else None
    return cast(Tensor, getattr(module, name) if waiting is None else waiting)


@torch.no_grad()
def changes_nothing(model: nn.Module, name: str, full: Iterable[str]) -> bool:
    """True where the adapter's model answers as the base does, as far as that can be seen in its tensors.

    full: paths of the modules of which it owns tensors in full.
    """
    for path in full:
        module = model.get_submodule(path)
        owned = override_tensors(module, name)
        if any(not torch.equal(tensor, base_tensor(module, key)) for key, tensor in owned.items()):
            return False
    for _, layer in row_layers(model, name):
        rows, table = layer.rows(name), layer.base_weight
        if not torch.equal(rows.values.to(table.dtype), table[rows.at]):
            return False
    return all(_is_idle(layer, layer.factors(name)) for _, layer in lora_layers(model) if name in layer.adapter_names)


def _is_idle(layer: LoraLayer, factors: LoraFactors) -> bool:
    a, b = factors.effective()
    if factors.start_a is not None and factors.start_b is not None:
        idle = torch.equal(factors.a, factors.start_a) and torch.equal(factors.b, factors.start_b)
    else:
        idle = factors.scale == 0 or not a.any() or not b.any()
    if not idle or factors.magnitude is None:
        return idle
    weight = layer.dense(layer)
    norms = row_norms(weight.mT if layer.transposed else weight, a, b, 0.0)
    return torch.allclose(factors.magnitude.to(norms.dtype), norms, rtol=1e-3)
