"""What an adapter has beside its factors, against the base: tensors in full, rows of tables, biases of B."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank.checkpoint.keys import B_BIAS, Key
from lowrank.core.finite import all_finite
from lowrank.core.token_rows import TokenRows
from lowrank.files.safetensors import DTYPE_NAMES
from lowrank.injection.patterns import matches_name
from lowrank.merge.disk.adapters import Adapter
from lowrank.merge.disk.found import Match
from lowrank.merge.disk.stored_rows import equals_stored
from lowrank.modelfiles.base import BaseFiles, Source
from lowrank.modelfiles.blocks import whole


def match_full(base: BaseFiles, adapter: Adapter, places: Mapping[str, str], found: Match) -> list[str]:
    faults = []
    for key, tensor in adapter.files.full.items():
        label = f"{key.path}.{key.name}".removeprefix(".")
        if tensor.dtype not in DTYPE_NAMES:
            faults.append(f"{label} is {tensor.dtype}, which cannot be stored")
            continue
        if tensor.is_floating_point() and not all_finite(tensor):
            faults.append(f"{label} holds values that are not finite")
            continue
        place = places.get(key.path, key.path)
        stored = found.stored(base, place, key.name)
        if stored is None:
            faults += _add(adapter, key, tensor, f"{place}.{key.name}".removeprefix("."), found)
            continue
        name, counterpart = stored
        shape = base.tensors[counterpart][1].shape
        if tuple(tensor.shape) != shape:
            advice = ": resize the base's vocabulary first" if tensor.shape[1:] == shape[1:] and tensor.ndim > 1 else ""
            faults.append(f"{label} has shape {list(tensor.shape)}, the base's has {list(shape)}{advice}")
        elif not equals_stored(base, counterpart, tensor):
            found.replaced[name] = tensor
    return faults


def _add(adapter: Adapter, key: Key, tensor: Tensor, name: str, found: Match) -> list[str]:
    """A tensor that the base does not have: the head of a task, or a name that means nothing."""
    saved = adapter.files.config.lora.modules_to_save
    parts = key.path.split(".")
    if key.of_base or not any(word in parts or matches_name(key.path, word) for word in saved):
        return [f"{name} is nowhere in the base"]
    found.added[name] = tensor
    found.notes.append(f"{name} is new: the base has no such tensor, the adapter brings it (modules_to_save)")
    return []


def match_rows(base: BaseFiles, adapter: Adapter, places: Mapping[str, str], found: Match) -> list[str]:
    faults = []
    for path, values in adapter.files.rows.items():
        stored = found.stored(base, places.get(path, path))
        if stored is None:
            faults.append(f"{path}, of which single rows are trained, is nowhere in the base")
            continue
        name, counterpart = stored
        shape, indices = base.tensors[counterpart][1].shape, adapter.files.row_indices(path)
        if len(shape) != 2 or values.shape[1] != shape[1]:
            faults.append(f"{path} has rows of {values.shape[1]}, the base's tensor has shape {list(shape)}")
        else:
            found.rows[name] = TokenRows(values.to(torch.promote_types(torch.float32, values.dtype)), indices)
    return faults


def match_bias(base: BaseFiles, adapter: Adapter, path: str, place: str, found: Match) -> list[str]:
    """B's own bias, of which s times goes into the layer's."""
    stored, added = found.stored(base, place, "bias"), adapter.files.low_rank[path][B_BIAS]
    own = None if stored is None else whole(Source(*base.tensors[stored[1]])).flatten()
    if stored is None or own is None or own.shape != added.shape:
        return [
            f"{path} has a bias of B (lora_bias) of shape {list(added.shape)}, and the base no such bias to add it to"
        ]
    found.replaced[stored[0]] = adapter.files.bias(path, own)
    return []
