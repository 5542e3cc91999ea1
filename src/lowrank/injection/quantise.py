"""A float model whose linear layers are put into four or eight bits, one at a time, before adapters go onto it."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.core.stored import Stored
from lowrank.core.stored.of_module import is_stored, stored_weight
from lowrank.errors import ConfigError
from lowrank.injection.patterns import matches_name
from lowrank.injection.repacking import REPACKS
from lowrank.injection.targets import named_targets, output_heads

Scheme = Literal["nf4", "fp4", "int8"]
Watcher = Callable[[str, Tensor, Stored], None]  # is given each layer's path, W0 and what is held of it


@dataclass(frozen=True, slots=True)
class Held:
    """What of a model is held in a stored form. layers: how many of `linear`; bytes: of them now, and as numbers."""

    form: str
    layers: int
    linear: int
    bytes: int
    plain_bytes: int

    def __str__(self) -> str:
        """As a run's summary says it."""
        unit, name = (1e9, "GB") if self.bytes > 1e9 else (1e6, "MB")
        sizes = f"{self.bytes / unit:,.1f} {name} instead of {self.plain_bytes / unit:,.1f}"
        return f"{self.form}, {self.layers} of {self.linear} linear layers, {sizes}"


@torch.no_grad()
def quantise(
    model: nn.Module,
    scheme: Scheme,
    *,
    double: bool = False,
    skip: Collection[str] = (),
    device: torch.device | str | None = None,
    watch: Watcher | None = None,
) -> Held:
    """In place: every Linear of `model` but its output head is held in bitsandbytes' `scheme`, on `device`.

    double: quantise the scales of four bits too. skip: names of modules that stay as they are. watch: is called with
    (path, W0, what is held of it) while both are there. Raises ConfigError where bitsandbytes is not installed.
    """
    bnb = require_bitsandbytes(f"quantise {scheme}")
    for path, module in quantisable(model, skip).items():
        weight = module.weight.detach()
        new = _layer(bnb, module, scheme, double).to(device or weight.device)
        new.train(module.training)
        model.set_submodule(path, new)
        if watch is not None:
            watch(path, weight.to(new.weight.device), stored_weight(new))
    found = what_is_held(model)
    if found is None:
        raise ConfigError(f"quantise {scheme}: this model has no Linear but its head that could be quantised")
    return found


def quantisable(model: nn.Module, skip: Collection[str]) -> dict[str, nn.Linear]:
    """{path: Linear} of the layers that `quantise` holds in a stored form."""
    modules = named_targets(model)
    heads = output_heads(model, modules)
    return {
        path: module
        for path, module in modules.items()
        if type(module) is nn.Linear and id(module) not in heads and not left_out(path, skip)
    }


def left_out(path: str, skip: Collection[str]) -> bool:
    """Whether the module at `path`, or one that it is in, is named by `skip`."""
    parts = path.split(".")
    return any(matches_name(".".join(parts[:end]), name) for end in range(1, len(parts) + 1) for name in skip)


def unpacked(model: nn.Module) -> None:
    """In place: no four-bit layer repacks its weight at its first answer: adapters that are put on later read it."""
    for module in model.modules():
        if REPACKS in module.__dict__:
            module.__dict__[REPACKS] = False


def what_is_held(model: nn.Module) -> Held | None:
    """What of the model is in a stored form; None where nothing is."""
    linear = [module for module in named_targets(model).values() if isinstance(module, nn.Linear)]
    found = [stored_weight(module) for module in linear if is_stored(module)]
    if not found:
        return None
    form = max({one.form for one in found}, key=[one.form for one in found].count)
    width = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 2)
    return Held(
        form, len(found), len(linear), sum(s.nbytes for s in found), width * sum(s.shape.numel() for s in found)
    )


def require_plain(model: nn.Module, what: str) -> None:
    """Raise ConfigError for a quantised model, whose frozen weights have no gradient to be measured."""
    if (found := what_is_held(model)) is not None:
        raise ConfigError(
            f"{what} needs the weights themselves, and this model is held in {found.form}: give the model "
            "that it was made from"
        )


def require_bitsandbytes(what: str) -> Any:
    """The package. Raises ConfigError, naming what needs it, where it is not installed.

    What it logs while it is imported is passed over: on a CPU it warns of kernels that it can do without.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(f"{what} needs bitsandbytes: pip install 'lowrank[quant]'") from error
    finally:
        log.setLevel(level)
    return bitsandbytes


def _layer(bnb: Any, module: nn.Linear, scheme: Scheme, double: bool) -> Any:
    """bitsandbytes' layer that holds the module's weight, quantised when it is moved to a device."""
    bias, weight = module.bias, module.weight.detach()
    d, k = weight.shape
    if scheme == "int8":
        layer = bnb.nn.Linear8bitLt(k, d, bias is not None, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            k, d, bias is not None, None, compress_statistics=double, quant_type=scheme, device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type=scheme, compress_statistics=double, module=layer
        )
        unpacked(layer)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer
