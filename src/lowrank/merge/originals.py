"""The weights of a model before it was quantised, one at a time: of a model in memory, or of a folder's files."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lowrank.core.stored import Stored
from lowrank.core.stored.of_module import is_stored, stored_weight
from lowrank.core.stored.stack import StoredStack
from lowrank.errors import MergeError, some
from lowrank.injection.traversal import base_modules
from lowrank.layers.kinds import kind_of
from lowrank.layers.linear import LoraLinear
from lowrank.layers.plain import was_conv1d
from lowrank.layers.stack import LoraStack
from lowrank.merge.apart import ANOTHER
from lowrank.modelfiles.base import BaseFiles, Source, read_base
from lowrank.modelfiles.blocks import whole
from lowrank.modelfiles.experts import InFiles, stacks_in_files
from lowrank.modelfiles.names import resolve
from lowrank.modelfiles.tensors import StoredEntry
from lowrank.modelfiles.whole_stack import read_stack, stack_shape

Original = nn.Module | str | os.PathLike[str]
Weights = Callable[[str], Tensor]  # from a layer's path to its W0, (d, k), as it was before
LOOKED_AT = 4  # layers, before the first one changes


def original_weights(original: Original, layers: Mapping[str, nn.Module]) -> Weights:
    """What reads the W0 of the quantised `layers` {path: layer} from the model that they were made from.

    Raises MergeError for a model that lacks one of them, holds it quantised or of another shape, and for another model.
    """
    held = {path: stored_weight(layer) for path, layer in layers.items()}
    read = _of_model(original, held) if isinstance(original, nn.Module) else _of_files(original, layers, held)
    for path in list(layers)[:: max(1, len(layers) // LOOKED_AT)][:LOOKED_AT]:
        if (share := _difference(read(path), held[path])) > ANOTHER:
            raise MergeError(
                f"onto original: this is not the model that the quantised one was made from, W0 of {path} differs by "
                f"{share:.0%}: give the one that was quantised"
            )
    return read


@torch.no_grad()
def _difference(original: Tensor, held: Stored) -> float:
    """‖W0 − Q(W0)‖ / ‖Q(W0)‖."""
    now = held.matrix(torch.float32)
    return float((original.to(now) - now).norm() / now.norm().clamp(min=1e-30))


def _of_model(model: nn.Module, held: Mapping[str, Stored]) -> Weights:
    modules = dict(base_modules(model))
    kinds = {path: kind_of(modules[path]) for path in held if path in modules}
    found = {
        path: kind.frozen(modules[path])
        for path, kind in kinds.items()
        if kind is not None and issubclass(kind, LoraLinear | LoraStack) and not is_stored(modules[path])
    }
    _require(path for path, stored in held.items() if path not in found or found[path].shape != stored.shape)
    return lambda path: cast(Tensor, found[path]).to(held[path].device)


def _of_files(folder: str | os.PathLike[str], layers: Mapping[str, nn.Module], held: Mapping[str, Stored]) -> Weights:
    base = read_base(folder)
    linear = {path: one for path, one in held.items() if not isinstance(one, StoredStack)}
    stacks = _stacks_of_files(base, {path: one for path, one in held.items() if isinstance(one, StoredStack)})
    shapes = {path: tuple(one.shape)[:: -1 if was_conv1d(layers[path]) else 1] for path, one in linear.items()}

    def fits(path: str, module: str) -> bool:
        entry = base.tensors[f"{module}.weight"][1] if f"{module}.weight" in base.tensors else None
        return entry is not None and entry.shape == shapes[path] and not isinstance(entry, StoredEntry)

    places = resolve(shapes, dict.fromkeys(name.rpartition(".")[0] for name in base.tensors), fits).modules
    _require(path for path in linear if path not in places or not fits(path, places[path]))

    def read(path: str) -> Tensor:
        if path in stacks:
            return read_stack(base, stacks[path]).to(held[path].device)
        stored = whole(Source(*base.tensors[f"{places[path]}.weight"]))
        return (stored.t() if was_conv1d(layers[path]) else stored).to(held[path].device)

    return read


def _stacks_of_files(base: BaseFiles, held: Mapping[str, StoredStack]) -> dict[str, InFiles]:
    """{path: where the files have the experts} of stacks. Raises MergeError where one is not there as it is held."""
    if not held:
        return {}
    found = stacks_in_files(base)
    places = resolve(held, dict.fromkeys(found), lambda _path, _place: True).modules
    stacks = {path: found[place] for path, place in places.items() if place in found}
    _require(path for path, one in held.items() if path not in stacks or stack_shape(base, stacks[path]) != one.shape)
    return stacks


def _require(missing: Iterable[str]) -> None:
    if names := list(missing):
        raise MergeError(
            f"onto original: the original has no weight of numbers, of the same shape, for {some(names)}: give the "
            "model that was quantised, in float16, bfloat16 or float32"
        )
