"""Whether what was injected is still in the model: modules are replaced, and embeddings resized, behind our back.

`resize_token_embeddings` writes a longer table into the embedding and puts a new head in the old one's place. Rows that
were there keep their change and new rows start without one. Any other replacement is an error: the adapter was made
for the weight that is gone.
"""

import warnings

import torch
from torch import Tensor, nn

from lowrank.core.factors import LoraFactors
from lowrank.errors import LowrankError, LowrankWarning, some
from lowrank.injection.state import AdapterState, Place, check_unfolded, find_state
from lowrank.injection.traversal import base_modules
from lowrank.layers.base import LoraLayer, extend, lora_mixin
from lowrank.layers.embedding import LoraEmbedding
from lowrank.layers.kinds import kind_of
from lowrank.layers.overrides import CHILD, override_tensors, overrides_of
from lowrank.layers.quantised import LoraQuantised
from lowrank.layers.stack import ExpertStack


def record(state: AdapterState, modules: dict[str, nn.Module]) -> None:
    """In place: what is adapted now is what has to be there; modules: the model's own, by path."""
    state.places = {path: _place(modules, path) for path, module in modules.items() if is_adapted(module)}


def is_adapted(module: nn.Module) -> bool:
    """Whether an adapter put something into the module: factors, or tensors of its own."""
    return isinstance(module, LoraLayer) or overrides_of(module) is not None


def _place(modules: dict[str, nn.Module], path: str) -> Place:
    parent, _, leaf = path.rpartition(".")
    weight = modules[path]._parameters.get("weight")
    if isinstance(stack := modules[path], ExpertStack):
        return Place(stack.experts, stack.child, stack, None)
    shape = None if weight is None or isinstance(modules[path], LoraQuantised) else weight.shape  # packed, or numbers
    return Place(modules[parent] if parent else None, leaf, modules[path], shape)


def set_trainable(module: nn.Module, name: str, trained: bool) -> None:
    """In place: the adapter's tensors in this module require gradients, or do not."""
    if isinstance(module, LoraLayer) and name in module.adapter_names:
        for parameter in module.factors(name).trainable():
            parameter.requires_grad_(trained)
    if isinstance(module, LoraLayer) and name in module.row_names:
        module.rows(name).values.requires_grad_(trained)
    for tensor in override_tensors(module, name).values():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(trained)


def injected_paths(model: nn.Module, adapter: str) -> set[str]:
    """Where `adapter` was put: the paths of the modules when it was, as far as they still carry it."""
    state = find_state(model)
    places = state.places.items() if state is not None else ()
    return {
        path
        for path, place in places
        if (isinstance(place.module, LoraLayer) and adapter in (*place.module.adapter_names, *place.module.row_names))
        or override_tensors(place.module, adapter)
    }


def has_changed(model: nn.Module, state: AdapterState) -> bool:
    """Whether an adapted module was taken from its parent, or a table has another length; quick, for every forward."""
    for place in state.places.values():
        parent = model if place.parent is None else place.parent
        if parent._modules.get(place.leaf) is not place.module and place.leaf:
            return True
        if (
            place.shape is not None
            and isinstance(place.module, nn.Embedding)
            and _is_resized(place.module, place.shape)
        ):
            return True
    return False


def _is_resized(module: nn.Module, shape: torch.Size) -> bool:
    weight = module._parameters.get("weight")  # flat or empty where it is sharded
    return weight is not None and weight.shape != shape and weight.dim() == len(shape) and weight.numel() > 0


def settle(model: nn.Module) -> None:
    """In place: adapters of resized modules are carried over, said by a LowrankWarning.

    Raises LowrankError, naming every module that was replaced by something else, before anything changes.
    """
    state = find_state(model)
    if state is None:
        return
    modules = dict(base_modules(model))
    replaced = _replaced(state, modules)
    faults = [f"{path} {why}" for path in replaced if (why := _why_not(state.places[path], modules.get(path)))]
    if faults:
        raise LowrankError(
            f"adapted modules are not in the model any more: {some(faults)}; put them back, or delete the adapter and "
            "inject once modules are replaced"
        )
    if not replaced:
        now = {id(module): path for path, module in modules.items()}  # what was wrapped hangs elsewhere
        state.places = {path: _place(modules, now[id(place.module)]) for path, place in state.places.items()}
        return
    check_unfolded(model, f"{', '.join(replaced)} changed")
    with state.turnstile.change(model):
        state.unwatch()  # what waits for a backward pass knows the factors' old shapes
        lengths = {rows for path in replaced if (rows := _carry(state.places[path], modules[path], state.trained))}
        record(state, modules)
    if lengths:
        warnings.warn(
            f"{', '.join(replaced)}: resized to {', '.join(map(str, lengths))} rows after injection; the adapters are "
            "carried over, and new rows start without a change",
            LowrankWarning,
            stacklevel=2,
        )


def _replaced(state: AdapterState, modules: dict[str, nn.Module]) -> list[str]:
    """The places whose module is nowhere in the model now (one that was wrapped is), or has another length."""
    present = {id(module) for module in modules.values()}
    return [
        path
        for path, place in state.places.items()
        if id(place.module) not in present or (place.shape is not None and _is_resized(place.module, place.shape))
    ]


def _why_not(place: Place, new: nn.Module | None) -> str | None:
    """Why the adapters at `place` cannot go over to the module that is there now, or None where they can."""
    old = place.module
    if new is None:
        return "was removed"
    length = 0 if (weight := new._parameters.get("weight")) is None else weight.shape[0]
    if isinstance(old, LoraLayer) and any(max(old.rows(name).indices) >= length for name in old.row_names):
        return f"has {length:,} rows, and an adapter owns one above these"
    if isinstance(old, LoraLayer) and isinstance(new, LoraLayer) and _holdings(new) == _holdings(old):
        return None
    same_kind = kind_of(new) is (lora_mixin(old) if isinstance(old, LoraLayer) else kind_of(old))
    if not same_kind or not isinstance(new, nn.Linear | nn.Embedding):
        return f"is now a {type(new).__name__}"
    before, after = old._parameters.get("weight"), new._parameters.get("weight")
    if before is None or after is None or place.shape is None or after.shape[1:] != place.shape[1:]:
        return "has another weight"
    if isinstance(old, LoraLayer) and any(old.factors(name).parts for name in old.adapter_names):
        return "has another shape, and its adapter is one of parts of a fused projection"
    kept = min(place.shape[0], after.shape[0])
    if new is not old and not torch.equal(before[:kept].to(after.device), after[:kept]):
        return f"is another {type(new).__name__} now, with other weights"
    return None


def _holdings(layer: LoraLayer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return layer.adapter_names, layer.row_names


@torch.no_grad()
def _carry(place: Place, new: nn.Module, trained: tuple[str, ...]) -> int | None:
    """In place: the adapters of the old module live in `new`, `trained` require gradients. Returns its rows, if new."""
    old = place.module
    if isinstance(new, LoraLayer) and new is not old:
        return None
    rows: int = new._parameters["weight"].shape[0]  # type: ignore[union-attr]
    if isinstance(old, LoraLayer):
        layer = extend(new, lora_mixin(old))
        for name in old.adapter_names:
            factors = old.factors(name)
            _resize(factors, layer, rows)
            if layer is not old:
                layer.add_factors(name, factors)
        for name in old.row_names if layer is not old else ():
            layer.add_rows(name, old.rows(name))
        layer.active_rows = old.active_rows
        layer.activate(old.active_adapters)
    _carry_overrides(old, new)
    new.requires_grad_(False)  # who resizes sets the flag of all that is in the module
    for name in trained:
        set_trainable(new, name, trained=True)
    return rows


def _resize(factors: LoraFactors, layer: LoraLayer, rows: int) -> None:
    """In place: A's columns of a table, or B's rows of a head, cut or filled up with zeros."""
    if isinstance(layer, LoraEmbedding):
        along, tensors = 1, (factors.a, factors.start_a)
    else:
        along, tensors = 0, (factors.b, factors.start_b)
    for tensor in tensors:
        if tensor is not None:
            tensor.data, tensor.grad = _filled(tensor.data, rows, along), None
    if not isinstance(layer, LoraEmbedding):
        factors.out_features = rows
    if factors.magnitude is not None:
        norms = layer.matrix(layer.base_weight).to(factors.magnitude.dtype).norm(dim=1)
        kept = min(rows, factors.magnitude.shape[0])
        factors.magnitude.data = torch.cat([factors.magnitude.data[:kept], norms[kept:]])
        factors.magnitude.grad = None


def _filled(tensor: Tensor, size: int, along: int) -> Tensor:
    missing = size - tensor.shape[along]
    if missing <= 0:
        return tensor.narrow(along, 0, size).clone()
    shape = [missing if i == along else n for i, n in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=along)


def _carry_overrides(old: nn.Module, new: nn.Module) -> None:
    """In place: full copies that wait get the rows that are new from the tensor in place."""
    overrides = overrides_of(old)
    if overrides is None:
        return
    if new is not old:
        new.add_module(CHILD, overrides)
    for table in (overrides._parameters, overrides._buffers):
        for key, waiting in table.items():
            now = new._parameters.get(key.rpartition(":")[2])
            if waiting is not None and now is not None and now.shape != waiting.shape:
                waiting.data = torch.cat([waiting.data[: now.shape[0]], now.data[waiting.shape[0] :]])
                waiting.grad = None
