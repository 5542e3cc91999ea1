"""The rows of tables in an adapter's files: whether they are whole, whether they fit, and as values."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowrank.checkpoint.keys import TOKENS, low_rank_key
from lowrank.core.finite import all_finite
from lowrank.core.stored.of_module import FLOATING
from lowrank.core.token_rows import TokenRows
from lowrank.injection.patterns import suggestion
from lowrank.injection.token_rows import entries, rows_refusal, too_short

if TYPE_CHECKING:
    from lowrank.checkpoint.read import AdapterFiles
    from lowrank.checkpoint.renaming import Renaming


def row_faults(files: "AdapterFiles") -> list[str]:
    """What is wrong with the rows themselves and with what the config says of them."""
    faults = []
    for path, tensor in sorted(files.rows.items()):
        key, indices = low_rank_key(path, TOKENS), files.row_indices(path)
        if not indices:
            faults.append(f"{key} holds rows, and trainable_token_indices in adapter_config.json does not say which")
        elif tensor.ndim != 2 or tensor.shape[0] != len(indices):
            faults.append(f"{key} has shape {list(tensor.shape)}, and adapter_config.json names {len(indices)} rows")
        elif tensor.dtype not in FLOATING:
            faults.append(f"{key} is {tensor.dtype}, none of float16, bfloat16, float32 and float64")
        elif not all_finite(tensor):
            faults.append(f"{key} holds values that are no finite numbers")
    said = files.config.lora.trainable_token_indices
    if said is not None and not files.rows:
        faults.append(f"missing {TOKENS} of a table (trainable_token_indices in adapter_config.json names rows)")
    return faults


def row_fit_faults(files: "AdapterFiles", modules: Mapping[str, nn.Module], rename: "Renaming") -> list[str]:
    """Why the rows cannot go into a model whose base modules are `modules`."""
    faults = []
    for path, tensor in files.rows.items():
        key, target = low_rank_key(path, TOKENS), rename(path)
        if target not in modules:
            faults.append(f"unexpected {key}: the model has no module {target}{suggestion(target, modules)}")
            continue
        module = modules[target]
        weight = module._parameters.get("weight")
        if (why := rows_refusal(module)) is not None or weight is None:
            faults.append(f"{key}: {why}")
        elif tensor.ndim == 2 and tensor.shape[1] != weight.shape[1]:
            faults.append(f"{key} has shape {list(tensor.shape)}, wanted rows of {weight.shape[1]}")
        elif (fault := too_short(module, target, files.row_indices(path))) is not None:
            faults.append(fault)
        if path in files.low_rank:
            faults.append(f"{path} has factors and rows of its own, of which only one can be meant")
    return faults


@torch.no_grad()
def rows_of(
    model: nn.Module, modules: Mapping[str, nn.Module], files: "AdapterFiles", rename: "Renaming"
) -> dict[str, TokenRows]:
    """{path: rows} of the file's tables in this model and, as PEFT ties them, of what follows the input embeddings."""
    found = {rename(path): files.row_indices(path) for path in files.rows}
    values = {rename(path): tensor for path, tensor in files.rows.items()}
    made: dict[str, TokenRows] = {}
    for entry in entries(model, modules, found, tie=False):
        weight = modules[entry.path]._parameters["weight"]
        assert weight is not None
        rows = TokenRows(_master(values[entry.path], weight), entry.indices)
        made |= dict.fromkeys((entry.path, *entry.followers), rows)
    return made


def _master(values: Tensor, weight: Tensor) -> Tensor:
    """A copy in float32 or wider where the weight is."""
    dtype = torch.promote_types(torch.promote_types(torch.float32, values.dtype), weight.dtype)
    return values.detach().to(device=weight.device, dtype=dtype, copy=True)
