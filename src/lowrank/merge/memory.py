"""Merging and unloading a model that is in memory."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank.core.stored.of_module import is_readable, is_stored
from lowrank.errors import LowrankWarning, MergeError, some
from lowrank.injection.adapters import check_release, drop, lora_layers, override_modules, switch
from lowrank.injection.presence import record, settle
from lowrank.injection.state import AdapterState, check_unfolded, require_adapter, require_state
from lowrank.injection.tied import part_tied_weights
from lowrank.injection.traversal import base_modules
from lowrank.layers.base import LoraLayer, let_go
from lowrank.layers.overrides import keep_override, override_tensors
from lowrank.layers.plain import become_linear, is_quantised
from lowrank.layers.quantised import LoraQuantised
from lowrank.merge.apart import Apart, apart_table
from lowrank.merge.disk.report import survival_warnings
from lowrank.merge.onto import (
    Onto,
    apart_from_trained,
    check_onto,
    dequantise_rest,
    fixed_stacks,
    fold_plain,
    fold_requantised,
    plain_dtype,
    quantised_layers,
    requantised,
    require_survival,
    stored_layers,
)
from lowrank.merge.originals import Original, Weights, original_weights
from lowrank.merge.overflow import merge_fault
from lowrank.merge.shared import shared_targets
from lowrank.merge.survival import surviving


def merge_and_unload(
    model: nn.Module,
    adapters: Iterable[str] | None = None,
    progress: bool = False,
    *,
    onto: Onto = "16bit",
    anyway: bool = False,
    original: Original | None = None,
) -> nn.Module:
    """In place: W ← W0 + Σ s·B·A over `adapters` (default: the active ones), and give the plain model back.

    Merging some of a model's adapters leaves the others as they were, active or not; merging the active ones drops the
    inactive ones, so that the result is one plain model with its original classes and `state_dict` keys.
    Sums are formed in float32 (float64 for a float64 base) by blocks of rows and rounded once to the weight's dtype. A
    weight that the target shared with another module gets a copy of its own first, and the model's config says so.

    A quantised model becomes a plain one by default (onto="16bit"): every quantised layer is dequantised as training
    saw it, the changes are added and rounded once to the dtype of the model's other weights. onto="quantised" puts the
    sums into the layers' own form again, which is coarser than most changes: where less than half of a module's ‖ΔW‖²
    would survive that, MergeError shows how much does, before anything changes; `anyway` does it all the same.
    onto="original" adds the changes to the weights of `original`, the model that the quantised one was made from: a
    folder, a name on the Hub, or that model in memory. W0 there is not the W0 of the training, so it warns with how far
    each module's answers are from those that were trained.

    Warns (LowrankWarning) where rounding swallows more than half of ΔW.

    Every layer changes over as a whole, weight and adapter together: interrupted between two layers, the model still
    answers as before, and a second call finishes. `progress` draws a bar on standard error.

    Raises MergeError before anything changes: for factors, weights or results that are not finite, and where an
    adapter that stays is a DoRA adapter of a merged layer (its row norms are those of the base that would be gone).
    """
    check_unfolded(model, "merge_and_unload")
    check_onto(onto)
    names = _chosen(model, adapters)
    settle(model)
    _check(model, names, everything=adapters is None)
    check_release(model, names if adapters is not None else tuple(require_state(model).configs))
    weights = _check_onto(model, names, onto, anyway, original)
    plain = plain_dtype(model) if onto != "quantised" and stored_layers(model) else None
    left: dict[str, float] = {}
    far: dict[str, Apart] = {}
    with require_state(model).turnstile.change(model):
        shared = shared_targets(model, names)
        layers = [(path, layer) for path, layer in lora_layers(model) if any(map(layer.holds, names))]
        dtypes = {str(plain or layer.base_weight.dtype).removeprefix("torch.") for _, layer in layers}
        for path, layer in _progress(layers, progress):
            own = tuple(filter(layer.holds, names))
            weight = weights(path) if weights is not None and is_quantised(layer) else None
            if weight is not None:
                far[path] = apart_from_trained(layer, own, weight)
            left[path] = _fold(layer, own, id(layer.base_weight) in shared, plain, weight)
        if plain is not None:
            dequantise_rest(model, plain, weights)
        _finish(model, names, plain, drop_rest=adapters is None)
    if far:
        warnings.warn(apart_table(far), LowrankWarning, stacklevel=2)
    for text in survival_warnings(left, ", ".join(sorted(dtypes)), "model.float() before"):
        warnings.warn(text, LowrankWarning, stacklevel=2)
    return model


def unload(model: nn.Module) -> nn.Module:
    """In place: drop every adapter. The base is back bit for bit: no weight was ever written."""
    drop(model, require_state(model).configs, "unload")
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The active adapters folded in for the block: the speed of the plain model, its answers those of the merged one.

    The original parameters are set aside, not overwritten, so leaving the block restores the exact bits, exceptions
    included. Costs a copy of the adapted weights while it lasts; not for training. Inside, whatever switches, adds or
    drops adapters raises LowrankError, another `merged` too. A copy of the model that is taken inside is not merged.
    """
    state = require_state(model)
    check_unfolded(model, "merged")
    settle(model)
    with state.turnstile.change(model):
        _check(model, state.active, everything=True)
        layers = [layer for _, layer in lora_layers(model) if layer.active_adapters or layer.active_rows]
        state.folded = True
        try:
            for layer in layers:
                layer.fold()
        except BaseException:
            _unfold(state, layers)
            raise
    try:
        yield model
    finally:
        with state.turnstile.change(model):
            _unfold(state, layers)


def _unfold(state: AdapterState, layers: Iterable[LoraLayer]) -> None:
    for layer in layers:
        layer.unfold()
    state.folded = False


def _chosen(model: nn.Module, adapters: Iterable[str] | None) -> tuple[str, ...]:
    state = require_state(model)
    names = state.active if adapters is None else tuple(adapters)
    for name in names:
        require_adapter(model, name)
    if len(set(names)) != len(names):
        raise MergeError(f"merge: an adapter is named twice in {names}")
    if not names:
        raise MergeError("merge: no adapter is active; set_active one, name some, or use unload to get the base back")
    return names


def _check(model: nn.Module, names: tuple[str, ...], everything: bool) -> None:
    """Everything that could go wrong with the arithmetic, found before the first weight is touched."""
    faults = []
    for path, layer in lora_layers(model):
        own = [name for name in names if layer.holds(name)]
        strange = [name for name in own if not _finite(layer, name)]
        faults += [f"adapter {name!r} has values that are not finite in {path}" for name in strange]
        if own and not strange and (why := merge_fault(layer, tuple(own))):
            faults.append(f"{path}: {why}")
        staying = [] if everything else [name for name in layer.adapter_names if name not in names]
        faults += [
            f"adapter {name!r} is DoRA in {path}, and its row norms need the unmerged base: merge it too, or delete it"
            for name in staying
            if own and layer.factors(name).magnitude is not None
        ]
    if faults:
        raise MergeError(f"cannot merge: {some(faults, separator='; ')}")


def _check_onto(
    model: nn.Module, names: tuple[str, ...], onto: Onto, anyway: bool, original: Original | None
) -> Weights | None:
    """Whether the way to merge can be had for this model, found before the first weight is touched.

    Returns what reads the original's weights, where these are asked for.
    """
    if (original is None) is (onto == "original"):
        raise MergeError(
            "onto original and original=... belong together: give both, the model that was quantised, or none"
        )
    if unread := [path for path, layer in stored_layers(model).items() if not is_readable(layer)]:
        raise MergeError(
            f"merge: {some(unread)} cannot be read any more, since bitsandbytes has repacked it for inference: load "
            "the model again, and give it the adapter before it answers"
        )
    if fixed := fixed_stacks(model):
        raise MergeError(
            f"merge: {some(fixed)} cannot become plain in memory, where their class holds FP8 alone: merge on disk "
            "(merge_checkpoint, lowrank merge)"
        )
    if original is not None:
        if not (held := stored_layers(model)):
            raise MergeError("onto original: no layer of this model is quantised; leave `onto` out")
        return original_weights(original, held)
    if onto == "16bit":
        return None
    for name in names:
        for path, module in override_modules(model, name):
            if isinstance(module, LoraQuantised) and "weight" in override_tensors(module, name):
                raise MergeError(
                    f"onto quantised: adapter {name!r} brings {path} in full, and it is quantised: merge onto 16bit"
                )
    stored = quantised_layers(list(lora_layers(model)))
    if not stored:
        raise MergeError("onto quantised: no adapted layer of this model is quantised; leave `onto` out")
    own = {path: tuple(name for name in names if name in layer.adapter_names) for path, layer in stored.items()}
    try:
        require_survival({path: requantised(stored[path], some)[0] for path, some in own.items() if some}, anyway)
    except NotImplementedError as error:
        raise MergeError(f"onto quantised: {error}; merge onto 16bit") from error
    return None


def _finite(layer: LoraLayer, name: str) -> bool:
    tensors = list(layer.factors(name).parameters()) if name in layer.adapter_names else []
    tensors += [layer.rows(name).values] if name in layer.row_names else []
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@torch.no_grad()
def _fold(
    layer: LoraLayer, names: tuple[str, ...], untie: bool, plain: torch.dtype | None, original: Tensor | None
) -> float:
    """In place: the merged values become the layer's weight, and the merged adapters leave. Returns ΔW's share left.

    plain: the dtype in which quantised layers become plain ones; None where they keep their form. original: a quantised
    layer's W0 before it was that, where the change is for it.
    """
    if is_quantised(layer):
        return fold_requantised(layer, names) if plain is None else fold_plain(layer, names, plain, original)
    merged_weight = layer.merged_weight(names)
    left = surviving(layer, names, merged_weight)
    if untie:
        layer.weight = nn.Parameter(merged_weight, requires_grad=layer.base_weight.requires_grad)
    else:
        layer.base_weight.data = merged_weight
    let_go(layer, names)
    return left


def _finish(model: nn.Module, names: tuple[str, ...], plain: torch.dtype | None, drop_rest: bool) -> None:
    """In place: full copies become the model's own; merged adapters are forgotten, and all others where asked."""
    state = require_state(model)
    for name in names:
        for _, module in list(override_modules(model, name)):
            keep_override(module, name)
            if isinstance(module, LoraQuantised) and not is_stored(module):
                weight = module.dense(module)
                become_linear(module, weight.to(plain or weight.dtype))
        del state.configs[name]
    active = tuple(name for name in state.active if name in state.configs)
    trained = tuple(name for name in state.trained if name in state.configs)
    record(state, dict(base_modules(model)))
    switch(model, (), ())  # so that the base's own tensors are in place
    part_tied_weights(model)
    switch(model, active, trained)
    if drop_rest or not state.configs:
        drop(model, state.configs, "merge_and_unload")


def _progress(layers: list[tuple[str, LoraLayer]], wanted: bool) -> Iterable[tuple[str, LoraLayer]]:
    if not wanted:
        return layers
    from rich.console import Console
    from rich.progress import track

    return track(layers, description="merging", console=Console(file=sys.stderr))
