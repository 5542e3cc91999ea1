"""loralib, the paper's own code: one file, keys `<module>.lora_A` and `<module>.lora_B`, no config.

https://github.com/microsoft/LoRA. A plain layer has A (r, k) and B (d, r). A MergedLinear, a fused projection of which
n of m equal parts are adapted, has the A of its parts stacked, (n·r, k), and their B, (n·d/m, r); `enable_lora` says
which; PEFT 0.2's had their B as a 1×1 convolution, (n·d/m, r, 1). In all of them s = lora_alpha/r, and neither number
is in the file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lowrank.adapters.convert.full import sort_full
from lowrank.adapters.convert.options import ConvertOptions, Read
from lowrank.adapters.convert.repack import pickle_bytes
from lowrank.adapters.convert.sound import ready, widened
from lowrank.adapters.convert.uniform import at_scale, common_alpha, refuse
from lowrank.checkpoint.adapter_folder import AdapterContent, exact_names
from lowrank.checkpoint.atomic import write_file
from lowrank.checkpoint.keys import A, B, Key
from lowrank.checkpoint.read import read_pickle, read_safetensors, sort_tensors
from lowrank.checkpoint.target import Target
from lowrank.errors import CheckpointError, ConfigError
from lowrank.modelfiles.lookup import is_table


def read_loralib(source: Path, options: ConvertOptions) -> Read:
    """The adapter in the file `source`; options.alpha is needed, options.enable_lora for MergedLinear layers."""
    return content_from(source, options)


def content_from(source: Path, options: ConvertOptions) -> Read:
    """The adapter in a file of loralib's layers, whoever wrote it."""
    low_rank, full = sort_tensors(_tensors(source, options.allow_pickle), source)
    if options.alpha is None:
        raise ConfigError(f"{source} does not say its lora_alpha: give the alpha that it was trained with")
    targets = {path: _target(source, path, pair, options) for path, pair in low_rank.items()}
    owned = sort_full(full, targets)
    content = AdapterContent(targets, exact_names(targets), {}, owned.tensors, owned.modules, owned.bias)
    tables = [path for path, target in targets.items() if target.kind == "embedding"]
    notes = (f"taken for lookup tables by their names: {', '.join(tables)}",) if tables else ()
    return Read(content, notes)


def _tensors(source: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if source.suffix == ".safetensors":
        return read_safetensors(source)
    if not allow_pickle:
        raise CheckpointError(
            f"{source} is a pickle: if you trust where it came from, allow it (allow_pickle=True, --allow-pickle), "
            "and it is read with torch.load(weights_only=True)"
        )
    return read_pickle(source)


def _target(source: Path, path: str, pair: Mapping[str, Tensor], options: ConvertOptions) -> Target:
    pair = {role: tensor[..., 0] if tensor.shape[2:] == (1,) else tensor for role, tensor in pair.items()}
    if set(pair) != {A, B} or any(tensor.ndim != 2 or tensor.numel() == 0 for tensor in pair.values()):
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in sorted(pair.items()))
        raise CheckpointError(f"{source}: {path} has {shapes}, wanted matrices lora_A and lora_B")
    a, b = (widened(pair[role], f"{source}: {path}.{role}") for role in (A, B))
    scale = float(options.alpha or 0) / b.shape[1]
    if a.shape[0] != b.shape[1]:
        b = _spread(source, path, a, b, options.enable_lora)
    return Target("embedding" if is_table(path) else "linear", a, b, scale)


def _spread(source: Path, path: str, a: Tensor, b: Tensor, enabled: Sequence[bool] | None) -> Tensor:
    """B over all rows of a fused projection, (d, n·r): each adapted part's B in its own rows and columns."""
    parts, rest = divmod(a.shape[0], b.shape[1])
    if rest or b.shape[0] % max(parts, 1):
        raise CheckpointError(f"{source}: {path} has A {list(a.shape)} and B {list(b.shape)}, which are no pair")
    if enabled is None or sum(enabled) != parts:
        raise ConfigError(
            f"{source}: {path} is a MergedLinear with {parts} adapted parts: give its enable_lora with that many true, "
            "such as true,false,true for the query and value of a fused qkv"
        )
    own, size = b.split(b.shape[0] // parts), b.shape[0] // parts
    spread = b.new_zeros(size * len(enabled), a.shape[0])
    places = [place for place, on in enumerate(enabled) if on]
    for number, place in enumerate(places):
        columns = slice(number * b.shape[1], (number + 1) * b.shape[1])
        spread[place * size : (place + 1) * size, columns] = own[number]
    return spread


ENDINGS = (".safetensors", ".bin", ".pt", ".pth")


def write_loralib(content: AdapterContent, out: Path, options: ConvertOptions) -> tuple[str, ...]:
    """Write the file `out`, a pickle unless it ends in `.safetensors`; what loralib's layers need to know is told.

    Fused projections become plain layers of n times the rank. Scales that differ go into B.
    """
    refuse(content, "a loralib file", dora=True, full=False, conv=True)
    alpha = common_alpha(content.targets)
    tensors: dict[str, Tensor] = {}
    for path, target in content.targets.items():
        equal = at_scale(target, alpha / target.a.shape[0])
        tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = equal.a, equal.b
    full = {_full_name(key): tensor for key, tensor in content.full.items()}
    _save(out, dict(sorted((ready(tensors, options.dtype, out) | ready(full, None, out)).items())))
    ranks = ", ".join(str(rank) for rank in sorted({target.a.shape[0] for target in content.targets.values()}))
    return (f"build loralib's layers with r={ranks} and lora_alpha={alpha!r}: the file does not say it",)


def _full_name(key: Key) -> str:
    return f"{key.path}.{key.name}" if key.path else key.name


def _save(out: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    if out.suffix == ".safetensors":
        write_file(out, save(tensors, metadata={"format": "pt"}))
    else:
        write_file(out, pickle_bytes(tensors))
