"""`model.save_pretrained` of a transformers model that has adapters: adapter folders, and what Trainer resumes from."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from lowrank.checkpoint.atomic import write_folder
from lowrank.checkpoint.gather import Values
from lowrank.checkpoint.save import warn_of_peft
from lowrank.checkpoint.written import adapter_files, serialise
from lowrank.core.shards import whole
from lowrank.errors import CheckpointError
from lowrank.injection.adapters import adapter_configs
from lowrank.injection.saving import adapter_state

CHECKPOINT = re.compile(r"checkpoint-\d+")  # what Trainer calls a folder that it may resume from
STATE = "model.safetensors"  # what it reads there


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    adapters: Collection[str] | None = None,
) -> None:
    """Write the adapters of `model` as `save_adapter` does: a single one to `folder`, several as PEFT lays them out,

    "default" in `folder` and each other in a subfolder of its name. Files that lie there already are left alone.

    A folder that has the name of a Trainer's checkpoint gets `model.safetensors` too: the adapters' part of the model's
    state_dict, bit for bit, which Trainer loads to resume, and at the end for the best model. Nothing of the base is
    written anywhere.

    state_dict: whole tensors for those of a sharded model. adapters: which of them; all, where it is not said. Raises
    CheckpointError for what cannot be written.
    """
    if push_to_hub:
        raise CheckpointError(
            "save_pretrained(push_to_hub=True) is not done for adapters: call model.push_to_hub, "
            "or upload the folder that save_pretrained writes"
        )
    folder, values = Path(folder), _values(model, state_dict)
    names = tuple(name for name in adapter_configs(model) if adapters is None or name in adapters)
    content: dict[Path, dict[str, bytes]] = {}
    for name in names:
        place = folder if len(names) == 1 or name == "default" else folder / name
        content[place] = adapter_files(model, name, values=values)
    if CHECKPOINT.fullmatch(folder.name):
        own = {key: values(tensor).detach() for key, tensor in adapter_state(model).items()}
        content[folder] = {STATE: serialise(own)} | content.get(folder, {})
    if is_main_process:
        warn_of_peft(model, names)
        for place, files in content.items():
            write_folder(place, files)


def _values(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> Values:
    """Gives a tensor of the model as `state_dict` has it, which only the main process may have; else gathers it."""
    if not state_dict:
        return whole
    given = {id(t): state_dict[key] for key, t in model.state_dict(keep_vars=True).items() if key in state_dict}
    return lambda tensor: given[id(tensor)] if id(tensor) in given else whole(tensor)
