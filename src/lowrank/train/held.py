"""A model loaded tensor by tensor into four or eight bits: no more than some weights of it are ever dense."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.errors import CheckpointError, ConfigError
from lowrank.injection.quantise import left_out, require_bitsandbytes, unpacked
from lowrank.injection.targets import named_targets, output_heads
from lowrank.layers.kinds import is_linear
from lowrank.merge.onto import forget_quantiser
from lowrank.modelfiles.base import read_base
from lowrank.train.attention import attention_options
from lowrank.train.held_experts import hold_experts, with_experts
from lowrank.train.models import OFFLINE, answers_of, head_modules, load_causal, load_judge, quantiser_in, quiet
from lowrank.train.settings import HeldSettings

PER_CALL = "bitsandbytes.autograd._functions"  # it logs a warning at every call of an int8 layer in float32
POOLER = "pooler"  # the one module inside of a classifier's base that files may lack, so that it starts new


def load_held(
    folder: Path, settings: HeldSettings, dtype: torch.dtype, device: torch.device, skip: Sequence[str]
) -> nn.Module:
    """The causal language model in a folder, every linear map but its head and `skip` quantised as it is read.

    Conv1D (GPT-2) too. Raises ConfigError for a model that comes quantised, CheckpointError as `load_causal` does.
    """
    from transformers import AutoModelForCausalLM

    _check(folder, settings)
    skeleton = _skeleton(AutoModelForCausalLM, folder)
    kept = kept_plain(skeleton, skip)
    return _held(load_causal(folder, dtype, **_options(settings, dtype, device, kept, skip)))


def load_held_judge(
    folder: Path,
    labels: Sequence[str],
    settings: HeldSettings,
    dtype: torch.dtype,
    device: torch.device,
    skip: Sequence[str],
) -> tuple[nn.Module, tuple[str, ...]]:
    """(model, modules that start new) of a sequence classifier, as `load_judge` gives them; quantised as it is read."""
    from transformers import AutoModelForSequenceClassification

    _check(folder, settings)
    skeleton = _skeleton(AutoModelForSequenceClassification, folder, **answers_of(labels))
    pooler = (POOLER,) if not _has_pooler(folder) else ()
    kept = kept_plain(skeleton, (*skip, *head_modules(skeleton, ()), *pooler))
    model, fresh = load_judge(folder, labels, dtype, **_options(settings, dtype, device, kept, skip))
    return _held(model), fresh


def _check(folder: Path, settings: HeldSettings) -> None:
    assert settings.quantise is not None
    require_bitsandbytes(f"quantise {settings.quantise}")
    if quantiser_in(folder):
        raise ConfigError(f"--quantise {settings.quantise}: model {folder} comes quantised already; leave it out")


def _options(
    settings: HeldSettings, dtype: torch.dtype, device: torch.device, kept: Iterable[str], skip: Sequence[str]
) -> dict[str, Any]:
    """What transformers' from_pretrained is told. kept: the paths of linear maps that stay as they are; skip: names."""
    from transformers import BitsAndBytesConfig

    four: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": settings.quantise,
        "bnb_4bit_use_double_quant": settings.double,
        "bnb_4bit_compute_dtype": dtype,
    }
    eight = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    config = BitsAndBytesConfig(llm_int8_skip_modules=list(kept), **(eight if settings.quantise == "int8" else four))
    own = attention_options(settings, device, dtype)
    config = with_experts(config, settings, tuple(skip))
    return {"quantization_config": config, "device_map": {"": str(device)}, **own}


def _held(model: nn.Module) -> nn.Module:
    logging.getLogger(PER_CALL).setLevel(logging.ERROR)
    forget_quantiser(model)
    unpacked(model)
    hold_experts(model)
    return model


def _skeleton(auto: Any, folder: Path, **said: Any) -> Any:
    """The model without its numbers."""
    from transformers import AutoConfig

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), **said, **OFFLINE)
        return auto.from_config(config, trust_remote_code=False)


def kept_plain(skeleton: nn.Module, skip: Sequence[str]) -> list[str]:
    """The paths of linear maps that stay as they are: the head, and what `skip` names."""
    modules = named_targets(skeleton)
    heads = output_heads(skeleton, modules)
    return [path for path, m in modules.items() if is_linear(m) and (id(m) in heads or left_out(path, skip))]


def _has_pooler(folder: Path) -> bool:
    """Whether the files have its weights; what they lack starts new, and is trained in full."""
    try:
        return any(f".{POOLER}." in f".{name}" for name in read_base(folder).tensors)
    except CheckpointError:  # no safetensors: the loader says what it finds
        return True
