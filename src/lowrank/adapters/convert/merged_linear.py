"""PEFT 0.2's adapters with `enable_lora`: a folder like today's, whose fused projections are MergedLinear layers.

They are loralib's, with B as a grouped 1×1 convolution (n·d/m, r, 1), and the config says what a loralib file does not.
PEFT dropped them with 0.3, so nothing else reads them.
"""

from dataclasses import replace
from pathlib import Path

from lowrank.adapters.convert.loralib import content_from
from lowrank.adapters.convert.options import ConvertOptions, Read
from lowrank.checkpoint.adapter_folder import ORIGIN
from lowrank.checkpoint.config_file import NAME
from lowrank.checkpoint.read import PICKLE, SAFETENSORS
from lowrank.errors import CheckpointError
from lowrank.modelfiles.base import read_json


def has_merged_linear(folder: Path) -> bool:
    """True for the folder of such an adapter."""
    return (folder / NAME).is_file() and bool(read_json(folder / NAME).get("enable_lora"))


def read_merged_linear(source: Path, options: ConvertOptions) -> Read:
    """The adapter in the folder `source`. Raises CheckpointError for a config that does not say its layers."""
    config = read_json(source / NAME)
    alpha, enabled = config.get("lora_alpha"), config.get("enable_lora")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{source / NAME} has no number as lora_alpha")
    if not isinstance(enabled, list) or not all(isinstance(one, bool) for one in enabled):
        raise CheckpointError(f"{source / NAME} has no list of true and false as enable_lora")
    weights = SAFETENSORS if (source / SAFETENSORS).is_file() else PICKLE
    read = content_from(source / weights, replace(options, alpha=float(alpha), enable_lora=enabled))
    origin = {name: config[name] for name in ORIGIN if name in config}
    return replace(read, content=replace(read.content, origin=origin))
