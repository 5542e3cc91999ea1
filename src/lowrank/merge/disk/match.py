"""One adapter against the base: which tensors it changes, which it replaces, which it brings along."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from lowrank.checkpoint.keys import B_BIAS
from lowrank.checkpoint.read import AdapterFiles
from lowrank.errors import CheckpointError, some
from lowrank.injection.patterns import matches, matches_name, suggestion
from lowrank.merge.disk.adapters import Adapter, Contribution
from lowrank.merge.disk.expert_places import expert_changes, stacks_for, with_experts
from lowrank.merge.disk.found import IN_PROJ, Match
from lowrank.merge.disk.match_whole import match_bias, match_full, match_rows
from lowrank.merge.disk.sidefiles import own_texts
from lowrank.merge.disk.stored_rows import first_numbers
from lowrank.modelfiles.base import BaseFiles
from lowrank.modelfiles.dialects import translations
from lowrank.modelfiles.names import resolve
from lowrank.modelfiles.orientation import kinds_that_fit, shape_fault, stores_transposed
from lowrank.modelfiles.quantised import unread_form
from lowrank.modelfiles.tensors import StoredEntry
from lowrank.modelfiles.tied import has_head, head_of, may_be_tied

LARGEST_SCALE = torch.finfo(torch.float32).max


def match(base: BaseFiles, adapter: Adapter) -> Match:
    """Find every tensor of `adapter` its place in `base`.

    Raises CheckpointError for names that match nothing, shapes that do not fit, and tensors that cannot be merged into:
    the first faults, and how many there are.
    """
    stacks = stacks_for(base, adapter.files)
    adapter = replace(adapter, files=with_experts(base, adapter.files, stacks))
    files = adapter.files
    modules = _modules(base) | dict.fromkeys(stacks)
    paths = list(dict.fromkeys([*files.low_rank, *(key.path for key in files.full), *files.rows]))
    resolution = resolve(paths, modules, lambda path, module: _may_fit(base, files, path, module))
    places = dict(resolution.modules)
    found = Match(renamed=resolution.renamed)
    if files.unknown_fields:
        found.notes.append(f"{adapter.label}: config fields not understood: {some(files.unknown_fields, 8)}")
    if own := own_texts(base, adapter.folder):
        found.notes.append(
            f"{adapter.label} has a {' and a '.join(own)} that the base has not: the result has the base's, copy them "
            "over if the model is to be used with them"
        )
    for path in paths:
        if found.stored(base, places.get(path, path)) or path in files.experts:
            continue
        if shared := _shared_embedding(base, places.get(path, path)):
            places[path], embedding = shared
            found.heads[f"{places[path]}.weight"] = embedding
    faults = _changes(base, adapter, places, found, modules) + match_full(base, adapter, places, found)
    faults += expert_changes(base, adapter, places, found.changed, stacks) + match_rows(base, adapter, places, found)
    if faults and (method := unread_form(base)):
        raise CheckpointError(
            f"{base.label} is quantised ({method}), a form that is not read here: give the model it was made from, "
            "in float16, bfloat16, float32 or float64"
        )
    if faults:
        raise CheckpointError(
            f"{adapter.folder}: this adapter does not fit {base.label}: {some(faults, separator='; ')}"
        )
    found.notes += _unadapted(base, adapter, found)
    return found


def _modules(base: BaseFiles) -> dict[str, None]:
    """The modules that own the base's tensors, in order."""
    return dict.fromkeys(name.rpartition(".")[0] for name in base.tensors)


def _may_fit(base: BaseFiles, files: AdapterFiles, path: str, module: str) -> bool:
    tensor = base.tensors.get(f"{module}.weight") or base.tensors.get(f"{module}.{IN_PROJ}")
    if path not in files.low_rank or path in files.experts:
        return True
    return tensor is not None and bool(kinds_that_fit(files, path, tensor[1].shape))


def _shared_embedding(base: BaseFiles, path: str) -> tuple[str, str] | None:
    """(the head's path, its embedding's tensor) for a head that the base does not store; None where there is none."""
    if not may_be_tied(base.config):
        return None
    heads = {name: head_of(name.removesuffix(".weight")) for name in base.tensors if name.endswith(".weight")}
    words = {path, *(translated for (translated,) in translations([path]))}
    found = [(head, name) for name, head in heads.items() if head and any(matches_name(head, word) for word in words)]
    return found[0] if len(found) == 1 else None


def _changes(
    base: BaseFiles, adapter: Adapter, places: Mapping[str, str], found: Match, modules: Mapping[str, None]
) -> list[str]:
    files, faults = adapter.files, []
    kinds: dict[str, tuple[str, list[str]]] = {}
    for path in [path for path in files.low_rank if path not in files.experts]:
        stored = found.stored(base, places[path]) if path in places else None
        if stored is None:
            faults.append(_nowhere(base, adapter, path, places.get(path, path), modules))
            continue
        name, tensor = stored
        shape = base.tensors[tensor][1].shape
        kinds[path] = name, kinds_that_fit(files, path, shape)
        if abs(files.config.scale(path) * adapter.weight) > LARGEST_SCALE:
            faults.append(f"{path}: its scale {files.config.scale(path) * adapter.weight:g} does not fit into float32")
        if not kinds[path][1]:
            faults.append(shape_fault(files, path, shape))
        elif B_BIAS in files.low_rank[path]:
            faults += match_bias(base, adapter, path, places[path], found)
    certain = [fitting[0] for _, fitting in kinds.values() if len(fitting) == 1]
    for path, (name, fitting) in kinds.items():
        if len(fitting) == 2:
            fitting = ["conv1d-linear" if stores_transposed(base, files, path, certain) else "linear"]
        if fitting:
            found.changed[name] = Contribution(adapter, path, fitting[0])
    return faults


def _nowhere(base: BaseFiles, adapter: Adapter, path: str, place: str, modules: Mapping[str, None]) -> str:
    """One phrase for a module of the adapter whose weight the base does not store."""
    words = (base.config or {}).get("vocab_size")
    if may_be_tied(base.config) and has_head(base.config) and words == adapter.files.pair(path)[1].shape[0]:
        return (
            f"{path} is not stored in the base, where it may be one tensor with the embedding: load the model and use "
            "merge_and_unload"
        )
    if place in modules:
        own = [name for name in base.tensors if name.rpartition(".")[0] == place]
        return f"{path} has no weight in the base, only {some(own)}"
    return f"{path} is nowhere in the base{suggestion(path, modules)}"


def _unadapted(base: BaseFiles, adapter: Adapter, found: Match) -> list[str]:
    """A note where the adapter's list of targets names tensors that its file has nothing for: it may not be whole."""
    config = adapter.files.config.lora
    if not isinstance(config.target_modules, tuple) or config.layers_to_transform or config.exclude_modules:
        return []
    named = {
        name
        for name, (_, entry) in base.tensors.items()
        if len(entry.shape) > 1 and matches(name.removesuffix(".weight"), config.target_modules, "target_modules")
    }
    missing = sorted(named - found.changed.keys() - found.replaced.keys())
    if not missing or not named & found.changed.keys():
        return []
    return [f"{adapter.label}: target_modules names {some(missing, 1)} too, and the adapter's file has nothing for it"]


def another_base(base: BaseFiles, adapter: Adapter, found: Match) -> list[str]:
    """A note where the adapter was trained over W0 in a stored form, and the base has other numbers."""
    stored = adapter.files.companion.stored
    share = distance_of_bases(base, adapter, found)
    if stored is None or not share:
        return []
    quantised = any(isinstance(entry, StoredEntry) for _, entry in base.tensors.values())
    remedy = "; LoftQ moved it: merge into the model that was quantised" if stored.moved and quantised else ""
    return [
        f"{adapter.label} was trained over a base held in {stored.form}, from which W0 here differs by {share:.1%}: "
        f"the merged answers are not quite those of the training{remedy}"
    ]


def distance_of_bases(base: BaseFiles, adapter: Adapter, found: Match) -> float | None:
    """By how much W0 here differs from that of the training, over what the adapter remembers; None if it does not."""
    stored = adapter.files.companion.stored
    if stored is None:
        return None
    places = {one.path: (found.heads.get(name, name), one) for name, one in found.changed.items() if one.is_first}
    return stored.distance(lambda path: first_numbers(base, *places[path]) if path in places else None)
