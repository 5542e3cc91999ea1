"""The AdamW that `--optimizer` names, and what each remembers of a tensor that it trains.

adamw           torch's fused step where the device has one: the whole update in one pass over a tensor's numbers
adamw-unfused   an operation after the other, as every version did before there was a choice; other last bits
adamw8bit       bitsandbytes': both moments in 8 bits, with a scale for 256 numbers (arXiv 2110.02861); tensors of
                fewer than 4,096 numbers keep theirs in float32
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, short
from lowrank.injection.quantise import require_bitsandbytes
from lowrank.train.settings import LoopSettings

FUSED = ("cpu", "cuda", "xpu", "mps")  # devices of torch's fused step
LEAST_8BIT, BLOCK = 4096, 256  # bitsandbytes' own: numbers of a tensor held in 8 bits, numbers that share a scale
TABLES = ("qmap1", "qmap2")  # the 256 numbers that 8 bits mean, which are the same for all tensors and steps

Groups = list[dict[str, Any]]
Entry = dict[str, Any]  # what is remembered of one tensor: tensors and plain numbers


def made(name: str, groups: Groups, settings: LoopSettings) -> torch.optim.Optimizer:
    """The optimiser of this name over groups of float32 tensors. Raises ConfigError for one that cannot run there."""
    options: dict[str, Any] = {"lr": settings.rate, "betas": (settings.beta1, settings.beta2)}
    return UPDATES[name](groups, options | {"weight_decay": settings.weight_decay})


def check_optimizer(name: str, device: torch.device) -> None:
    """Raise ConfigError, before anything is loaded, where this optimiser cannot take a step on the device."""
    if name == "adamw8bit":
        tensor = nn.Parameter(torch.zeros(LEAST_8BIT, device=device))
        tensor.grad = torch.ones_like(tensor)
        try:
            _in_8_bits([{"params": [tensor]}], {}).step()
        except (RuntimeError, NotImplementedError, AttributeError) as error:  # it has no kernel for this device
            reason = short(" ".join(str(error).split()), 120)
            raise ConfigError(
                f"--optimizer adamw8bit: the installed bitsandbytes has no such step on {device} ({reason}): upgrade "
                "it, or leave --optimizer out"
            ) from None


def fresh(adamw: torch.optim.Optimizer, tensor: Tensor) -> Entry:
    """What the optimiser remembers of a tensor before its first step: the keys, shapes and dtypes of all later ones."""
    places = ((g, i, p) for g, held in enumerate(adamw.param_groups) for i, p in enumerate(held["params"]))
    group, at = next((g, i) for g, i, p in places if p is tensor)
    if (begin := getattr(adamw, "init_state", None)) is not None:  # bitsandbytes'
        held = adamw.state.pop(tensor, None)
        begin(adamw.param_groups[group], tensor, group, at)
        found = dict(adamw.state.pop(tensor))
        if held is not None:
            adamw.state[tensor] = held
        return found
    device = tensor.device if adamw.param_groups[group].get("fused") else "cpu"
    moments = {key: torch.zeros_like(tensor, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=device), **moments}


def written(entry: Entry) -> Entry:
    """The part of what is remembered that steps change."""
    return {key: value for key, value in entry.items() if key not in TABLES}


def bytes_of(name: str, tensors: Iterable[Tensor]) -> int:
    """Bytes that the moments of these tensors take."""
    sizes = [tensor.numel() for tensor in tensors]
    if name != "adamw8bit":
        return sum(8 * size for size in sizes)
    return sum(8 * size if size < LEAST_8BIT else 2 * (size + 4 * -(-size // BLOCK)) for size in sizes)


def _fused(groups: Groups, options: dict[str, Any]) -> torch.optim.Optimizer:
    here = all(tensor.device.type in FUSED for group in groups for tensor in group["params"])
    return torch.optim.AdamW(groups, fused=here, **options)


def _in_8_bits(groups: Groups, options: dict[str, Any]) -> Any:
    bnb = require_bitsandbytes("--optimizer adamw8bit")
    return bnb.optim.AdamW8bit(groups, **options)


UPDATES: dict[str, Callable[[Groups, dict[str, Any]], torch.optim.Optimizer]] = {
    "adamw": _fused,
    "adamw-unfused": lambda groups, options: torch.optim.AdamW(groups, **options),
    "adamw8bit": _in_8_bits,
}
