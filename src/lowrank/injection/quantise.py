"""A float model whose linear layers and experts are put into four or eight bits before adapters go onto it."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.core.stored import Stored
from lowrank.core.stored.held_as import form_of, held_as
from lowrank.core.stored.of_module import is_stored, stored_weight
from lowrank.core.stored.stack import HeldStack
from lowrank.errors import ConfigError
from lowrank.injection.patterns import matches_name
from lowrank.injection.repacking import REPACKS
from lowrank.injection.targets import named_targets, output_heads
from lowrank.layers.experts import hold_stored, stores_transposed
from lowrank.layers.stack import ExpertStack, row_blocks

Scheme = Literal["nf4", "fp4", "int8"]
Watcher = Callable[[str, Tensor, Stored], None]  # is given each layer's path, W0 and what is held of it


@dataclass(frozen=True, slots=True)
class Held:
    """What of a model is held in a stored form. layers: how many of `linear`; bytes: of them now, and as numbers.

    stacks: how many of `all_stacks`, the stacked parameters of a mixture's experts.
    """

    form: str
    layers: int
    linear: int
    bytes: int
    plain_bytes: int
    stacks: int = 0
    all_stacks: int = 0

    def __str__(self) -> str:
        """As a run's summary says it."""
        unit, name = (1e9, "GB") if self.bytes > 1e9 else (1e6, "MB")
        sizes = f"{self.bytes / unit:,.1f} {name} instead of {self.plain_bytes / unit:,.1f}"
        experts = f" and {self.stacks} of {self.all_stacks} expert stacks" if self.all_stacks else ""
        return f"{self.form}, {self.layers} of {self.linear} linear layers{experts}, {sizes}"


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

    So are stacked experts, each of their matrices by the rule for a Linear, a gate apart from its up projection.

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
    quantise_stacks(model, scheme, double=double, skip=skip, device=device, watch=watch)
    found = what_is_held(model)
    if found is None:
        raise ConfigError(f"quantise {scheme}: this model has no Linear but its head that could be quantised")
    return found


@torch.no_grad()
def quantise_stacks(
    model: nn.Module,
    scheme: Scheme,
    *,
    double: bool = False,
    skip: Collection[str] = (),
    device: torch.device | str | None = None,
    watch: Watcher | None = None,
) -> None:
    """In place: every stack of experts of `model` is held in `scheme`; as `quantise`, which does this too."""
    for path, stack in quantisable_stacks(model, skip).items():
        weight = stack.weight.detach()
        held = quantised_stack(stack.experts, stack.parameter, weight.to(device or weight.device), scheme, double)
        hold_stored(stack.experts, stack.parameter, held)
        if watch is not None:
            watch(path, weight.to(held.device), held)


def quantisable(model: nn.Module, skip: Collection[str]) -> dict[str, nn.Linear]:
    """{path: Linear} of the layers that `quantise` holds in a stored form."""
    modules = named_targets(model)
    heads = output_heads(model, modules)
    return {
        path: module
        for path, module in modules.items()
        if type(module) is nn.Linear and id(module) not in heads and not left_out(path, skip)
    }


def quantisable_stacks(model: nn.Module, skip: Collection[str]) -> dict[str, ExpertStack]:
    """{path: stack of experts} of those that `quantise` holds in a stored form."""
    return {
        path: module
        for path, module in named_targets(model).items()
        if isinstance(module, ExpertStack) and module.weight.is_floating_point() and not left_out(path, skip)
    }


def quantised_stack(experts: nn.Module, parameter: str, weight: Tensor, scheme: Scheme, double: bool) -> HeldStack:
    """What is held of a stack, (E, n, m): each expert's matrices as a Linear with that weight would be quantised."""
    transposed, form, held = bool(stores_transposed(experts)), form_of(scheme, double), []
    parts = row_blocks(experts, parameter, weight.shape[1])
    for matrix in weight.unbind():
        blocks = [matrix[rows].t() if transposed else matrix[rows] for rows in parts]
        found = [held_as(block.contiguous(), form, weight.dtype) for block in blocks]
        held.append([one for one in found if one is not None])
    return HeldStack.of(held, transposed)


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
    modules = named_targets(model).values()
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    stacks = [module for module in modules if isinstance(module, ExpertStack)]
    layers, experts = ([stored_weight(m) for m in some if is_stored(m)] for some in (linear, stacks))
    found = layers + experts
    if not found:
        return None
    form = max({one.form for one in found}, key=[one.form for one in found].count)
    width = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 2)
    sizes = sum(s.nbytes for s in found), width * sum(s.shape.numel() for s in found)
    return Held(form, len(layers), len(linear), *sizes, len(experts), len(stacks))


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
