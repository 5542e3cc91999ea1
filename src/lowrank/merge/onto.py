"""What a merge into a quantised base writes: plain weights, or the base's own form again with what is left of ΔW."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lowrank.core.factors import LoraFactors
from lowrank.core.stored import Stored, requantise
from lowrank.core.stored.of_module import is_stored, stored_weight
from lowrank.core.stored.of_stack import reader_of_stacks
from lowrank.core.stored.stack import StoredStack
from lowrank.errors import ConfigError, MergeError
from lowrank.injection.traversal import base_modules
from lowrank.layers.base import LoraLayer, let_go
from lowrank.layers.plain import become_plain, is_quantised, put_stored
from lowrank.layers.stack import ExpertStack
from lowrank.merge.apart import Apart, apart
from lowrank.merge.originals import Weights
from lowrank.merge.survival import surviving

Onto = Literal["16bit", "original", "quantised"]
LEAST = 0.5  # of ‖ΔW‖²: where less of a module's change survives requantising, most of what was learned is lost
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")  # of a quantised model


def check_onto(onto: str) -> None:
    """Raise ConfigError for a word that is none of the three."""
    if onto not in get_args(Onto):
        raise ConfigError(f"onto={onto!r} is not known: choose one of {', '.join(get_args(Onto))}")


def plain_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of the parameters that are not quantised: that of plain weights beside them."""
    counts = Counter(
        parameter.dtype
        for _, module in base_modules(model)
        for parameter in module._parameters.values()
        if parameter is not None and parameter.dtype in FLOATS and not isinstance(module, LoraFactors)
    )
    return counts.most_common(1)[0][0] if counts else torch.bfloat16


@torch.no_grad()
def fold_plain(layer: LoraLayer, names: tuple[str, ...], dtype: torch.dtype, original: Tensor | None = None) -> float:
    """In place: a plain layer with W0 + Σ ΔW, rounded once. Returns ΔW's share left.

    original: W0 before it was quantised; as training saw it where not given.
    """
    weight = layer.merged_weight(names, dtype, original)
    left = surviving(layer, names, weight, original)
    let_go(layer, names)
    become_plain(layer, weight)
    return left


def apart_from_trained(layer: LoraLayer, names: tuple[str, ...], original: Tensor) -> Apart:
    """How far `original` + Σ ΔW is from what was trained, over the weight that the layer holds."""
    both = zip(layer.units(original, names), layer.units(layer.dense(layer), names), strict=True)
    return apart((weight, held, changes, trained) for (weight, changes), (held, trained) in both)


@torch.no_grad()
def fold_requantised(layer: LoraLayer, names: tuple[str, ...]) -> float:
    """In place: the layer's own form of W0 + Σ ΔW. Returns ΔW's share left."""
    left, stored = requantised(layer, names)
    let_go(layer, names)
    put_stored(layer, stored)
    return left


@torch.no_grad()
def requantised(layer: LoraLayer, names: tuple[str, ...]) -> tuple[float, Stored]:
    """(the share of ‖ΔW‖² that survives, W0 + Σ ΔW in the layer's own form), computed from unrounded sums."""
    like, total = stored_weight(layer), layer.merged_weight(names, torch.float32)
    stored = like.requantised(total) if isinstance(like, StoredStack) else requantise(total, like)
    return surviving(layer, names, stored.matrix(torch.float32)), stored


def require_survival(shares: Mapping[str, float], anyway: bool) -> None:
    """Raise MergeError, with a table of modules, where a merge would lose more than half of a module's change."""
    lost = {path: share for path, share in shares.items() if share < LEAST}
    if not lost or anyway:
        return
    raise MergeError(
        f"onto quantised: {len(lost)} of {len(shares)} modules would keep less than {LEAST:.0%} of ‖ΔW‖², since the "
        "change is finer than the grid of the quantised weights: merge onto 16bit, keep the adapter apart, or say "
        f"anyway\n{survival_table(shares)}"
    )


def survival_table(shares: Mapping[str, float], most: int = 20) -> str:
    """A line for each module, the least first."""
    worst = sorted(shares.items(), key=lambda item: item[1])
    more = [f"  and {len(worst) - most} more"] if len(worst) > most else []
    return "\n".join([*(f"  {share:7.1%} left  {path}" for path, share in worst[:most]), *more])


@torch.no_grad()
def dequantise_rest(model: nn.Module, dtype: torch.dtype, weights: Weights | None = None) -> None:
    """In place: every layer that is still quantised becomes a plain one, adapters included, and the model says so.

    weights: what each weight was before it was quantised; as training saw it where not given.
    """
    for path, module in stored_layers(model).items():
        weight = stored_weight(module).matrix(dtype) if weights is None else weights(path).to(dtype, copy=True)
        become_plain(module, weight)
    forget_quantiser(model)


def forget_quantiser(model: nn.Module) -> None:
    """In place: what transformers notes about a quantised model is gone, so that it is saved as a plain one."""
    for module in model.modules():
        for name in MARKS:
            module.__dict__.pop(name, None)
        if (steps := module.__dict__.get("_weight_conversions")) is not None:  # from files to the model and back
            module.__dict__["_weight_conversions"] = [step for step in steps if not _quantises(step)]
        if "is_quantized" in module.__dict__:
            module.__dict__["is_quantized"] = False
        config: Any = getattr(module, "config", None)
        if config is not None and getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


def _quantises(step: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(step, "operations", ()))


def stored_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{path: layer} of the model's linear layers and stacks of experts in a stored form, adapted or not."""
    return {path: m for path, m in base_modules(model) if isinstance(m, nn.Linear | ExpertStack) and is_stored(m)}


def fixed_stacks(model: nn.Module) -> list[str]:
    """The paths of stacks of experts whose module's class has a stored form of its own, and no other."""
    stacks = ((path, m) for path, m in stored_layers(model).items() if isinstance(m, ExpertStack))
    return [path for path, stack in stacks if reader_of_stacks(type(stack.experts)) is not None]


def quantised_layers(layers: list[tuple[str, LoraLayer]]) -> dict[str, LoraLayer]:
    """{path: layer} of those that are in a stored form."""
    return {path: layer for path, layer in layers if is_quantised(layer)}
