"""How attention is computed: what `--attention` asks transformers for, where it can run."""

import torch

from lowrank.errors import ConfigError
from lowrank.train.settings import MachineSettings

FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # and what they import


def attention_options(settings: MachineSettings, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What transformers' `from_pretrained` is told of it; nothing where the choice is left to it.

    Raises ConfigError where the kernels are not installed, or run on another device or in other numbers only.
    transformers would fetch kernels that are missing from the Hub, where it could.
    """
    name = settings.attention
    if name is None:
        return {}
    if name in FLASH:
        _check_flash(name, device, dtype)
    return {"attn_implementation": name}


def _check_flash(name: str, device: torch.device, dtype: torch.dtype) -> None:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if device.type != "cuda":
        raise ConfigError(f"--attention {name}: its kernels run on GPUs, not on {device}; leave it out")
    if dtype == torch.float32:
        raise ConfigError(f"--attention {name}: its kernels compute in 16 bits; give --dtype bfloat16, or leave it out")
    there = is_flash_attn_2_available() if name == "flash_attention_2" else is_flash_attn_3_available()
    if not there:
        raise ConfigError(f"--attention {name} needs the package {FLASH[name]}, which is not installed for this GPU")
