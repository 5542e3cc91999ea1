"""The three files of an adapter as bytes, from the adapter in its model."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from lowrank.checkpoint import companion, config_file
from lowrank.checkpoint.companion import Companion, Fused
from lowrank.checkpoint.describe import unsaid
from lowrank.checkpoint.expert_files import owner_of, parameter_names, wrapped_paths
from lowrank.checkpoint.fingerprint import fingerprint
from lowrank.checkpoint.gather import Values, whole_factors
from lowrank.checkpoint.keys import MAGNITUDE, TOKENS, full_key, low_rank_key
from lowrank.checkpoint.layout import file_rank, kind_in_file, magnitude_shape, pair_roles, to_file
from lowrank.checkpoint.one_scale import Scales, folded, written_scales
from lowrank.checkpoint.read import SAFETENSORS
from lowrank.checkpoint.stored_base import stored_base
from lowrank.checkpoint.write_config import config_bytes
from lowrank.core.factors import LoraFactors
from lowrank.core.shards import whole
from lowrank.core.stored.of_module import frozen_shape, is_readable
from lowrank.errors import CheckpointError, some
from lowrank.injection.adapters import lora_layers, override_modules, row_layers
from lowrank.injection.config import LoraConfig
from lowrank.injection.patterns import matches_name, split_parts
from lowrank.injection.presence import injected_paths, settle
from lowrank.injection.state import require_adapter
from lowrank.injection.targets import named_targets
from lowrank.injection.token_rows import leading, said_indices
from lowrank.injection.traversal import base_modules
from lowrank.layers.base import LoraLayer
from lowrank.layers.overrides import override_tensors, own_tensors
from lowrank.layers.stack import ExpertStack


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One adapted module: its layer, its factors as whole tensors, and the scale that the file gives it."""

    layer: LoraLayer
    factors: LoraFactors
    scale: float

    @property
    def groups(self) -> int:
        return cast(int, getattr(self.layer, "groups", 1))

    @property
    def described(self) -> tuple[int, float]:
        """(rank, scale) as the file has them."""
        return file_rank(self.factors.effective_rank, self.groups), self.scale


def adapter_files(model: nn.Module, adapter: str, scales: Scales = "one", values: Values = whole) -> dict[str, bytes]:
    """{name: content} of what `save_adapter` writes. values: gives a tensor of the model whole.

    Raises LowrankError for an unknown adapter and for adapted modules that were replaced, CheckpointError for such that
    are found elsewhere and for tensors that cannot be written.
    """
    config = require_adapter(model, adapter)
    settle(model)
    layers = {path: layer for path, layer in lora_layers(model) if adapter in layer.adapter_names}
    rows = {path: layer.rows(adapter) for path, layer in row_layers(model, adapter)}
    _check_whole(model, adapter, {*layers, *rows, *(path for path, _ in override_modules(model, adapter))})
    written = written_scales({path: layer.factors(adapter).scale for path, layer in layers.items()}, scales)
    parts = {
        path: _Part(layer, whole_factors(layer.factors(adapter), values), written[path])
        for path, layer in layers.items()
    }
    full = _full_tensors(model, adapter, config, Counter(owner_of(path, layer) for path, layer in layers.items()))
    tensors = dict(_low_rank_tensors(parts)) | {key: values(tensor).detach() for key, tensor in full.items()}
    modules = named_targets(model)
    said = said_indices(model, modules, rows)
    tensors |= {low_rank_key(p, TOKENS): values(rows[p].values).detach() for p in leading(model, modules, rows)}
    _check(tensors)
    return {
        SAFETENSORS: serialise(tensors),
        companion.NAME: _companion(model, parts, config).to_bytes(),
        config_file.NAME: _config(model, parts, replace(config, trainable_token_indices=said)),
    }


def _check_whole(model: nn.Module, adapter: str, found: set[str]) -> None:
    """Raise CheckpointError where what would be written is not what was injected."""
    if missing := sorted(injected_paths(model, adapter) - found):
        moved = some(sorted(found - injected_paths(model, adapter)))
        raise CheckpointError(
            f"adapter {adapter!r} was put into {some(missing)}, but is not found there now"
            f"{f' (it is in {moved})' if moved else ''}: take off what wraps the modules, and save then"
        )


def _low_rank_tensors(parts: dict[str, _Part]) -> Iterator[tuple[str, Tensor]]:
    names = wrapped_paths({path: part.layer for path, part in parts.items()})
    for path, part in parts.items():
        a, b = (tensor.detach() for tensor in part.factors.effective())
        b = folded(b, part.factors.scale, part.scale)
        kind = kind_in_file(part.layer.kind, part.factors.magnitude is not None)
        pair = to_file(kind, a, b, tuple(frozen_shape(part.layer)), part.groups)
        for role, tensor in zip(pair_roles(part.layer.kind), pair, strict=True):
            yield low_rank_key(names[path], role), tensor
        if part.factors.magnitude is not None:
            shape = magnitude_shape(part.layer.kind, tuple(frozen_shape(part.layer)))
            yield low_rank_key(names[path], MAGNITUDE), part.factors.magnitude.detach().view(shape)


def _full_tensors(model: nn.Module, adapter: str, config: LoraConfig, adapted: Counter[str]) -> dict[str, Tensor]:
    """What the adapter owns in full, and what PEFT takes for owned: it matches `modules_to_save` by any ending."""
    tensors = {
        full_key(path, name, adapted=adapted[path]): tensor
        for path, module in override_modules(model, adapter)
        for name, tensor in override_tensors(module, adapter).items()
    }
    for root, module in named_targets(model).items():
        if root.endswith(tuple(config.modules_to_save)) and not _is_saved(root, config):
            for path, inner in module.named_modules(prefix=root):
                for name in own_tensors(inner):
                    tensors.setdefault(full_key(path, name, adapted=False), cast(Tensor, getattr(inner, name)))
    return tensors


def _is_saved(path: str, config: LoraConfig) -> bool:
    return any(matches_name(path, name) for name in config.modules_to_save)


def _check(tensors: dict[str, Tensor]) -> None:
    faults = []
    for key, tensor in tensors.items():
        if tensor.is_meta:
            faults.append(f"{key} is on the meta device and has no values")
        elif tensor.numel() == 0:
            faults.append(f"{key} has shape {list(tensor.shape)}: gather the sharded parameters before saving")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            faults.append(f"{key} holds values that are not finite")
    if faults:
        raise CheckpointError(f"the adapter cannot be saved: {'; '.join(faults)}")


def serialise(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file of copies, so that none share their memory."""
    from safetensors.torch import save

    ready = {key: tensors[key].to("cpu", copy=True).contiguous() for key in tensors}
    return cast(bytes, save(ready, metadata={"format": "pt"}))


def _config(model: nn.Module, parts: dict[str, _Part], config: LoraConfig) -> bytes:
    modules = named_targets(model)
    return config_bytes(
        model,
        config,
        {path: part.described for path, part in parts.items()},
        [path for path, module in modules.items() if not isinstance(module, ExpertStack)],
        stacks=parameter_names([path for path in parts if isinstance(modules[path], ExpertStack)], modules),
        transposed=any(part.layer.kind == "conv1d-linear" for part in parts.values()),
    )


def _companion(model: nn.Module, parts: dict[str, _Part], config: LoraConfig) -> Companion:
    return Companion(
        base=fingerprint(model, {path: part.layer for path, part in parts.items()}),
        fused={
            path: Fused(_part_names(path, config), part.factors.parts)
            for path, part in sorted(parts.items())
            if part.factors.parts
        },
        start=frozenset(path for path, part in parts.items() if part.factors.start_a is not None),
        scales=unsaid(
            {path: part.described for path, part in parts.items()},
            {path: part.factors.scale for path, part in parts.items()},
        ),
        stored=stored_base(
            ((path, part.layer) for path, part in sorted(parts.items())),
            sorted(path for path, module in base_modules(model) if path not in parts and is_readable(module)),
        ),
    )


def _part_names(path: str, config: LoraConfig) -> tuple[str, ...]:
    """The names of a fused projection's parts, as the selector in the config has them."""
    said = [names or () for names in (config.target_modules, config.target_parameters)]
    for selector in [one for names in said for one in ([names] if isinstance(names, str) else names)]:
        name, parts = split_parts(selector)
        if parts and matches_name(path, name):
            return parts
    return ()
