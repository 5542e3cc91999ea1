"""A language model loaded tensor by tensor into four or eight bits: no more than some weights of it are ever dense."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.errors import ConfigError
from lowrank.injection.quantise import left_out, require_bitsandbytes, unpacked
from lowrank.injection.targets import named_targets, output_heads
from lowrank.layers.kinds import is_linear
from lowrank.merge.onto import forget_quantiser
from lowrank.train.models import OFFLINE, load_causal, quantiser_in, quiet
from lowrank.train.settings import HeldSettings


def load_held(
    folder: Path, settings: HeldSettings, dtype: torch.dtype, device: torch.device, skip: Sequence[str]
) -> nn.Module:
    """The causal language model in a folder, every linear map but its head and `skip` quantised as it is read.

    Conv1D (GPT-2) too. Raises ConfigError for a model that comes quantised, CheckpointError as `load_causal` does.
    """
    from transformers import BitsAndBytesConfig

    assert settings.quantise is not None
    require_bitsandbytes(f"quantise {settings.quantise}")
    if quantiser_in(folder):
        raise ConfigError(f"--quantise {settings.quantise}: model {folder} comes quantised already; leave it out")
    eight = settings.quantise == "int8"
    four: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": settings.quantise,
        "bnb_4bit_use_double_quant": settings.double,
        "bnb_4bit_compute_dtype": dtype,
    }
    kept = _kept_plain(folder, skip)
    config = BitsAndBytesConfig(
        llm_int8_skip_modules=kept, **({"load_in_8bit": True, "llm_int8_threshold": 0.0} if eight else four)
    )
    model = load_causal(folder, dtype, quantization_config=config, device_map={"": str(device)})
    forget_quantiser(model)
    unpacked(model)
    return model


def _kept_plain(folder: Path, skip: Sequence[str]) -> list[str]:
    """The paths of linear maps that stay as they are, told by the model's skeleton."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), **OFFLINE)
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    modules = named_targets(skeleton)
    heads = output_heads(skeleton, modules)
    return [path for path, m in modules.items() if is_linear(m) and (id(m) in heads or left_out(path, skip))]
