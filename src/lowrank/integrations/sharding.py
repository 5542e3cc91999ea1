"""In which shards a model can be trained and its adapter saved by other programs, and in which it cannot."""

import sys

import torch
from torch import nn

from lowrank.errors import LowrankError


def check_sharding(model: nn.Module) -> None:
    """Raise LowrankError where a model is sharded so that its adapter could not be trained, or not be read again.

    DeepSpeed's third stage leaves a layer its weight only while that layer runs, and layers that share an input are
    computed together here. accelerate asks PEFT for an adapter's keys where it saves shards, and PEFT knows its own
    layers' alone: what is written would be read back as nothing, without a word, and Trainer writes no adapter at all.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise LowrankError(
            "DeepSpeed's ZeRO stage 3 takes weights apart that lowrank computes together: use stage 1 or 2, or FSDP2"
        )
    accelerate = sys.modules.get("accelerate.state")
    plugin = accelerate and accelerate.AcceleratorState._shared_state.get("fsdp_plugin")
    if plugin is not None and _is_fsdp2(model) and "FULL" not in str(plugin.state_dict_type):
        raise LowrankError(
            "FSDP would write the adapter in shards, which nobody reads: set fsdp_state_dict_type to FULL_STATE_DICT, "
            "of which a checkpoint holds the adapter alone"
        )


def _is_fsdp2(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)
