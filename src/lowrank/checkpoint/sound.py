"""Whether the tensors of an adapter's files are whole, and what the config says of them: with no model at hand."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank.checkpoint.keys import B_BIAS, MAGNITUDE, low_rank_key
from lowrank.checkpoint.layout import pair_roles
from lowrank.checkpoint.row_files import row_faults
from lowrank.core.finite import all_finite

if TYPE_CHECKING:
    from lowrank.checkpoint.read import AdapterFiles

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor_faults(files: "AdapterFiles") -> list[str]:
    """What is wrong with the tensors themselves and with what the config says of them."""
    faults = [f"{key.path}.{key.name} is empty" for key, tensor in files.full.items() if tensor.numel() == 0]
    for path, tensors in sorted(files.low_rank.items()):
        faults += _module_faults(files, path, tensors)
    return faults + row_faults(files)


def _module_faults(files: "AdapterFiles", path: str, tensors: Mapping[str, Tensor]) -> list[str]:
    kind, dora = files.kind(path), files.config.lora.use_dora
    biased = bool(files.config.raw.get("lora_bias"))
    wanted = {*pair_roles(kind), *({MAGNITUDE} if dora else ()), *({B_BIAS} if biased else ())}
    faults = [f"missing {low_rank_key(path, role)}" for role in sorted(wanted - tensors.keys())]
    faults += [f"unexpected {low_rank_key(path, role)}" for role in sorted(tensors.keys() - wanted)]
    for role, tensor in sorted(tensors.items()):
        key = low_rank_key(path, role)
        if tensor.numel() == 0:
            faults.append(f"{key} is empty, of shape {list(tensor.shape)}: its shards were not gathered before saving")
        elif not tensor.is_floating_point():
            faults.append(f"{key} is {tensor.dtype}, no floating-point tensor")
        elif tensor.dtype not in FLOATS:
            faults.append(f"{key} is {tensor.dtype}, none of float16, bfloat16, float32 and float64")
        elif not all_finite(tensor):
            faults.append(f"{key} holds values that are not finite")
    return faults


def rank_faults(files: "AdapterFiles") -> list[str]:
    """Pairs whose rank is not the declared one, so that their scale could not be trusted."""
    faults = []
    for path in sorted(files.low_rank):
        a, b = (files.low_rank[path].get(role) for role in pair_roles(files.kind(path)))
        rank = files.config.rank(path)
        if a is None or b is None or not a.numel() or not b.numel():
            continue
        stacked = files.config.lora.target_parameters and not files.config.known and a.ndim == b.ndim == 2
        if stacked and a.shape[0] == b.shape[1]:
            continue  # perhaps a pair for every expert, of a rank that its place will tell
        if a.ndim < 2 or a.ndim != b.ndim or a.shape[0] != rank or not _fits_rank(a, b, files.kind(path)):
            faults.append(
                f"{path} has A {list(a.shape)} and B {list(b.shape)}, and adapter_config.json says rank {rank}"
            )
    return faults


def _fits_rank(a: Tensor, b: Tensor, kind: str) -> bool:
    """Whether B (d, r, 1...) goes with A (r, k, ...); a grouped convolution's B has r/g and its A g·k columns."""
    groups, rest = divmod(a.shape[0], b.shape[1])
    if groups > 1 and (kind != "conv" or a.shape[1] % groups):
        return False
    return groups > 0 and rest == 0 and all(length == 1 for length in b.shape[2:])
