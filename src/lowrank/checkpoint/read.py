"""Reading an adapter's files into one value, with no model at hand."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lowrank.checkpoint.companion import Companion, read_companion
from lowrank.checkpoint.config_file import AdapterConfig, read_config
from lowrank.checkpoint.keys import B_BIAS, EMBEDDING_A, MAGNITUDE, TOKENS, A, Key, parse
from lowrank.checkpoint.layout import from_file, pair_roles
from lowrank.checkpoint.sound import rank_faults, tensor_faults
from lowrank.core.factors import LoraFactors
from lowrank.errors import CheckpointError, short
from lowrank.files.names import is_name
from lowrank.files.regular import opened
from lowrank.files.safetensors import read_tensors
from lowrank.hub import local_folder

SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
Packing = Literal["by-rank", "by-expert"]  # which varies fastest in B of a stack (d, r·E): the expert, or the rank
KOHYA = (".lora_down.weight", ".lora_up.weight")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as its files have it.

    low_rank: {module path: {role: tensor}}, roles and shapes as in the file (`checkpoint.keys`, `checkpoint.layout`);
    full: {key: tensor} of everything kept in full; rows: {module path: (n, d)} of tables of which single rows are
    trained, in the order of `row_indices`; companion: what lowrank itself saved beside PEFT's files.
    experts: {path: layer kind} of stacks of experts, once a model has told which these are (`checkpoint.expert_files`);
    singles: {path of a single expert: its stack's}, once each is a module of its own (`checkpoint.each_expert`).
    packing: how B of stacks is packed, where a user has said so; PEFT's way, by-rank, otherwise.
    Tensors are read into memory, not mapped: a file that another program cuts short then does no harm.
    """

    folder: Path
    config: AdapterConfig
    low_rank: Mapping[str, Mapping[str, Tensor]]
    full: Mapping[Key, Tensor]
    companion: Companion
    experts: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    singles: Mapping[str, str] = field(default_factory=dict)
    packing: Packing | None = None

    def row_indices(self, path: str) -> tuple[int, ...]:
        """The rows of the table at `path` that the file holds; empty where the config does not say them."""
        said = self.config.lora.trainable_token_indices
        if isinstance(said, Mapping):
            named = [rows for name, rows in said.items() if path.endswith(name)]  # as PEFT finds them
            return tuple(named[0]) if named else ()
        return tuple(said or ()) if len(self.rows) == 1 else ()

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Fields of `adapter_config.json` that we do not know and did not use."""
        return self.config.unknown

    def kind(self, path: str) -> str:
        """The layer kind that the tensors speak of: embedding, conv or linear (which includes Conv1D), or a stack's."""
        if path in self.experts:
            return self.experts[path]
        tensors = self.low_rank[path]
        if EMBEDDING_A in tensors:
            return "embedding"
        return "conv" if A in tensors and tensors[A].ndim > 2 else "linear"

    def pair(self, path: str) -> tuple[Tensor, Tensor]:
        """(A, B) of a module in the file's shapes."""
        a, b = pair_roles(self.kind(path))
        return self.low_rank[path][a], self.low_rank[path][b]

    def bias(self, path: str, own: Tensor) -> Tensor:
        """The layer's bias with s times B's added, rounded once: own (d,), the base's."""
        wide = torch.promote_types(torch.float32, own.dtype)
        added = self.low_rank[path][B_BIAS].to(device=own.device, dtype=wide)
        return torch.add(own.detach().to(wide), added, alpha=self.config.scale(path)).to(own.dtype)

    def factors(self, path: str, weight: tuple[int, ...]) -> LoraFactors:
        """The factors of a module whose weight has the shape `weight`: float32 or wider, ΔW = s·B·A over all of it.

        weight: as stored; only convolutions need it, others may give (). Start factors and parts stay folded into A and
        B, as they are in the file. Raises CheckpointError for a grouped convolution that cannot be merged.
        """
        a, b = from_file(self.kind(path), *self.pair(path), weight, where=path)
        magnitude = self.low_rank[path].get(MAGNITUDE)
        if magnitude is not None and path not in self.experts:
            magnitude = magnitude.flatten()
        return LoraFactors(
            _master(a),
            _master(b),
            self.config.scale(path),
            self.config.lora.lora_dropout,
            magnitude=None if magnitude is None else _master(magnitude),
        )

    def factors_of_expert(self, path: str, expert: int, count: int, rows: slice) -> LoraFactors:
        """The factors of some output rows of one of `count` experts of a stack (E, d, k): a (r, k), b (d', r)."""
        a, b = self.pair(path)
        a, b = a.unflatten(0, (count, -1))[expert], b.unflatten(1, (-1, count))[rows, :, expert]
        magnitude = self.low_rank[path].get(MAGNITUDE)
        own = None if magnitude is None else _master(magnitude[expert, rows])
        return LoraFactors(
            _master(a), _master(b), self.config.scale(path), self.config.lora.lora_dropout, magnitude=own
        )


def _master(tensor: Tensor) -> Tensor:
    """A copy in float32 or wider that no file stands behind."""
    return tensor.detach().to(torch.promote_types(torch.float32, tensor.dtype), copy=True)


def read_adapter(folder: str | os.PathLike[str], allow_pickle: bool = False) -> AdapterFiles:
    """The adapter in `folder`, which may be a name on the Hub, checked as far as that goes without a model.

    allow_pickle: read the `adapter_model.bin` of an old adapter, by torch.load(weights_only=True).

    Raises CheckpointError: no such folder, no or invalid `adapter_config.json`, features that cannot be represented,
    weights that are missing, truncated or garbage, and (all listed at once) tensors that are empty, without their
    partner, or of another rank than the config declares.
    """
    files = read_with_stacks(folder, allow_pickle)
    if files.config.lora.target_parameters:
        raise CheckpointError(
            f"{files.folder} adapts stacked experts (target_parameters), which this does not take: load_adapter and "
            "merges, in memory and on disk, do"
        )
    return files


def read_with_stacks(folder: str | os.PathLike[str], allow_pickle: bool = False) -> AdapterFiles:
    """`read_adapter`, of an adapter of stacked experts too, whose factors have the names that its file gives them."""
    files = open_adapter(folder, allow_pickle)
    if faults := tensor_faults(files) + rank_faults(files):
        raise CheckpointError(f"{files.folder}: {'; '.join(faults)}")
    return files


def open_adapter(name: str | os.PathLike[str], allow_pickle: bool) -> AdapterFiles:
    """`read_adapter` without the checks of single tensors."""
    folder = local_folder(name)
    config = read_config(folder)
    tensors = _read_tensors(folder, allow_pickle)
    rows = {key: parse(key).path for key in tensors if parse(key).role == TOKENS}
    low_rank, full = sort_tensors({key: tensor for key, tensor in tensors.items() if key not in rows}, folder)
    held = {path: tensors[key] for key, path in rows.items()}
    return AdapterFiles(folder, config, low_rank, full, read_companion(folder), rows=held)


def sort_tensors(tensors: Mapping[str, Tensor], where: Path) -> tuple[dict[str, dict[str, Tensor]], dict[Key, Tensor]]:
    """The tensors of an adapter file by module and role, and those kept in full."""
    low_rank: dict[str, dict[str, Tensor]] = {}
    full: dict[Key, Tensor] = {}
    for key, tensor in tensors.items():
        parsed = parse(key)
        if parsed.role is None:
            full[parsed] = tensor
        elif parsed.role in low_rank.setdefault(parsed.path, {}):
            raise CheckpointError(f"{where} holds {parsed.role} of {parsed.path} twice: save one adapter alone")
        else:
            low_rank[parsed.path][parsed.role] = tensor
    if not low_rank:
        raise CheckpointError(_without_factors(tensors, where))
    return low_rank, full


def _without_factors(tensors: Mapping[str, Tensor], where: Path) -> str:
    if any(key.endswith(KOHYA) for key in tensors):
        return (
            f"{where} is a kohya file (sd-scripts, for diffusion models): its names run a module's path together "
            "(lora_unet_..., .lora_down), so modules cannot be told from it; load it with diffusers' load_lora_weights"
        )
    return f"{where} holds no LoRA factors (no tensor is called lora_A or lora_embedding_A)"


def _read_tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if (folder / SAFETENSORS).is_file():
        return read_safetensors(folder / SAFETENSORS)
    if not (folder / PICKLE).is_file():
        raise CheckpointError(f"{folder} has an adapter_config.json but no {SAFETENSORS}: copy or save it again")
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} has its weights only as {PICKLE}, a pickle: if you trust where it came from, "
            "pass allow_pickle=True, which reads it with torch.load(weights_only=True)"
        )
    return read_pickle(folder / PICKLE)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file, read into memory."""
    return read_tensors(path)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a file written by torch.save, by torch.load(weights_only=True)."""
    try:
        with opened(path):  # a pipe would be waited for
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except CheckpointError:
        raise
    except Exception as error:  # pickle's errors have no common class
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is damaged, or more than a table of tensors ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds something else than a table of tensors")
    if strange := [name for name, tensor in content.items() if not (is_name(name) and _is_plain(tensor))]:
        raise CheckpointError(
            f"{path} holds {short(repr(strange[0]), 80)}, which is no name with a plain tensor of its own values"
        )
    return content


def _is_plain(tensor: Tensor) -> bool:
    """True for a dense tensor that has memory for each of its values: an expanded one is a page for a few bytes."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


__all__ = ["AdapterFiles", "read_adapter"]
