"""Tensors that an adapter owns in full instead of as a low-rank change: trained biases and `modules_to_save`.

A module's own tensors (its bias, or all of them) are copied for an adapter, and the copy takes the original's place in
the module while the adapter is active. The module keeps its class and its `state_dict` keys; what is not in place waits
in a child module, so that `.to(device)` moves it too. Putting the originals back is exact: they were never written.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lowrank.core.stored.of_module import is_stored, stored_weight

CHILD = "lowrank_overrides"
BASE = ""  # the owner's name of the original tensors; no adapter can be called so


class Overrides(nn.Module):
    """The tensors of one module that are not in place now, by owner (an adapter, or BASE) and tensor name."""

    def __init__(self) -> None:
        super().__init__()
        self.in_place = BASE
        self.owners: dict[str, tuple[str, ...]] = {}

    @staticmethod
    def key(owner: str, name: str) -> str:
        """The key under which a waiting tensor is registered."""
        return f"{owner.replace('.', '%2E')}:{name}"

    def put(self, owner: str, name: str, tensor: Tensor) -> None:
        """Keep a tensor that is not in place."""
        table = self._parameters if isinstance(tensor, nn.Parameter) else self._buffers
        table[self.key(owner, name)] = tensor  # type: ignore[assignment]

    def take(self, owner: str, name: str) -> Tensor:
        """Hand a waiting tensor out, to be put in place."""
        key = self.key(owner, name)
        tensor = self._parameters.pop(key) if key in self._parameters else self._buffers.pop(key)
        assert tensor is not None
        return tensor


def overrides_of(module: nn.Module) -> Overrides | None:
    """The module's overrides, None where no adapter owns any of its tensors."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, Overrides) else None


def own_tensors(module: nn.Module) -> list[str]:
    """The names of the tensors a module itself holds: parameters and persistent buffers.

    Of one whose weight is in a stored form, weight and bias: the scales are part of the weight.
    """
    if is_stored(module):
        return [name for name in ("weight", "bias") if module._parameters.get(name) is not None]
    buffers = [n for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set]
    return [n for n, p in module._parameters.items() if p is not None] + buffers


def _table(module: nn.Module, name: str) -> dict[str, Tensor | None]:
    return module._parameters if name in module._parameters else module._buffers  # type: ignore[return-value]


@torch.no_grad()
def add_override(module: nn.Module, adapter: str, names: Iterable[str]) -> None:
    """In place: give `adapter` its own copy of the named tensors, equal to the originals, and wait with it.

    The copy of a weight in a stored form is its matrix, as numbers. Integer buffers are copied too; floating parameters
    of the copy require gradients once the adapter is trained.
    """
    overrides, names = overrides_of(module), tuple(names)
    before = BASE if overrides is None else overrides.in_place
    select_override(module, BASE)
    originals = {name: _table(module, name)[name] for name in names}
    copies = {name: _copy(module, name, tensor) for name, tensor in originals.items() if tensor is not None}
    if overrides is None:  # only now: where there is no memory for the copies, nothing has changed
        overrides = Overrides()
        module.add_module(CHILD, overrides)
        overrides.owners[BASE] = ()
    for name in names:
        is_parameter = isinstance(originals[name], nn.Parameter)
        overrides.put(adapter, name, nn.Parameter(copies[name], False) if is_parameter else copies[name])
    overrides.owners[adapter] = names
    select_override(module, before)


def _copy(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    return stored_weight(module).matrix() if name == "weight" and is_stored(module) else tensor.detach().clone()


def select_override(module: nn.Module, owner: str) -> None:
    """In place: put the tensors of `owner` (an adapter, or BASE) where the module uses them."""
    overrides = overrides_of(module)
    if overrides is None or overrides.in_place == owner:
        return
    if overrides.in_place != BASE:
        _exchange(module, overrides, overrides.in_place, BASE, overrides.owners[overrides.in_place])
    if owner != BASE:
        _exchange(module, overrides, BASE, owner, overrides.owners[owner])
    overrides.in_place = owner


def _exchange(module: nn.Module, overrides: Overrides, leaving: str, coming: str, names: tuple[str, ...]) -> None:
    for name in names:
        table = _table(module, name)
        tensor = table[name]
        assert tensor is not None
        table[name] = overrides.take(coming, name)
        overrides.put(leaving, name, tensor)
    if isinstance(module, nn.RNNBase):  # it keeps a list of its weights, and computes with that
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def override_tensors(module: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors that `adapter` owns in this module, in place or waiting, by their names in the module."""
    overrides = overrides_of(module)
    if overrides is None or adapter not in overrides.owners:
        return {}
    found: dict[str, Tensor] = {}
    for name in overrides.owners[adapter]:
        key = overrides.key(adapter, name)
        waiting = overrides._parameters.get(key, overrides._buffers.get(key))
        tensor = _table(module, name)[name] if overrides.in_place == adapter else waiting
        assert tensor is not None
        found[name] = tensor
    return found


def remove_override(module: nn.Module, adapter: str) -> None:
    """In place: drop the adapter's tensors; the originals come back if they were displaced by them."""
    overrides = overrides_of(module)
    if overrides is None or adapter not in overrides.owners:
        return
    if overrides.in_place == adapter:
        select_override(module, BASE)
    for name in overrides.owners.pop(adapter):
        overrides.take(adapter, name)
    if set(overrides.owners) == {BASE}:
        del module._modules[CHILD]


def keep_override(module: nn.Module, adapter: str) -> None:
    """In place: make the adapter's tensors the module's own for good (a merge), dropping the originals they replace."""
    overrides = overrides_of(module)
    if overrides is None or adapter not in overrides.owners:
        return
    select_override(module, adapter)
    for name in overrides.owners.pop(adapter):
        overrides.take(BASE, name)
    overrides.in_place = BASE
    if set(overrides.owners) == {BASE}:
        del module._modules[CHILD]
