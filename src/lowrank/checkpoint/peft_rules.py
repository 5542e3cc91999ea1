"""What PEFT's own rules make of an adapter that is written in its format: which modules it would refuse or turn."""

from collections.abc import Collection

from torch import nn

from lowrank.errors import some

TRIED = "PEFT 0.21.2"

# peft.tuners.tuners_utils: refused by the last part of the name, on models of these types.
MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
REFUSED = frozenset({"out_proj", "conv1d"})

# peft.utils.transformers_weight_conversion: names that stood for experts one by one, before transformers stacked them.
# PEFT adapts the stacked experts instead, whatever other module the name means, and reads none of its tensors.
EXPERTS = {
    "mixtral": frozenset({"gate", "w1", "w3", "w2"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}


def peft_faults(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Why PEFT does not load an adapter on these modules of `model` as it is meant; empty where it does."""
    faults = []
    if read := _read_by_attention(model, paths):
        faults.append(f"it does not apply what {some(read)} learned, whose weight nn.MultiheadAttention reads uncalled")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str):
        return faults
    refused = _named(paths, REFUSED if model_type in MAMBA else ())
    turned = _named(paths, EXPERTS.get(_family(model_type) or "", ()))
    if refused:
        faults.append(f"it refuses {' and '.join(refused)} of a {model_type}")
    if turned:
        faults.append(
            f"it takes {', '.join(turned)} for the routed experts of a {model_type} and leaves their tensors unread"
        )
    return faults


def _read_by_attention(model: nn.Module, paths: Collection[str]) -> list[str]:
    inner = [(path, path.rpartition(".")[0]) for path in paths if "." in path]
    return [path for path, outer in inner if isinstance(model.get_submodule(outer), nn.MultiheadAttention)]


def _named(paths: Collection[str], names: Collection[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths} & set(names))


def _family(model_type: str) -> str | None:
    """The family by whose names transformers converts checkpoints of this type, as far as PEFT follows it."""
    try:
        from transformers import conversion_mapping
    except ImportError:  # a transformers that stacks no experts
        return None
    families: dict[str, str] = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    converted = conversion_mapping.get_checkpoint_conversion_mapping(model_type) is not None
    return families.get(model_type) if converted else None
