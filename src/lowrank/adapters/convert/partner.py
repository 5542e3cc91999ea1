"""Whether a model is the one an adapter was made for: shapes of ΔW against those of the model's weights.

The files of the weights say a shape where they are at hand; otherwise config.json does, for architectures whose layers
are known. What neither knows is not checked. Without this, another model's heads would be believed, and rows of query
and key put in a wrong order without a word.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowrank.adapters.convert.gguf_names import FAMILIES
from lowrank.checkpoint.adapter_folder import AdapterContent
from lowrank.checkpoint.target import Target
from lowrank.errors import CheckpointError, some
from lowrank.modelfiles.base import read_base, read_json
from lowrank.modelfiles.tied import architectures

Shape = tuple[int, ...]
LAYER = re.compile(r".*?\.([0-9]+)\.")
OWN_HEAD_SIZES = ("qwen3", "gemma", "gemma2", "gemma3")  # their heads are no equal parts of the hidden size


def check_partner(content: AdapterContent, model: Path) -> None:
    """Raise CheckpointError where a module of the adapter has another shape than in the model, or is beyond its layers.

    model: a folder with config.json; its weights are looked at (their headers alone) where it has any.
    """
    config = read_json(model / "config.json") if (model / "config.json").is_file() else {}
    stored = _stored(model)
    faults = [fault for path, target in content.targets.items() for fault in _faults(path, target, config, stored)]
    if faults:
        raise CheckpointError(f"{model} is not the base of this adapter: {some(faults, separator='; ')}")


def _stored(model: Path) -> dict[str, Shape]:
    """{tensor: shape} of the model's safetensors files; empty where there are none that can be read."""
    if any(model.glob("*.safetensors")):
        with suppress(CheckpointError):  # only config.json was asked for
            return {name: entry.shape for name, (_, entry) in read_base(model).tensors.items()}
    return {}


def _faults(path: str, target: Target, config: Mapping[str, Any], stored: Mapping[str, Shape]) -> Iterator[str]:
    own: Shape = target.kernel or target.shape
    wanted = stored.get(f"{path}.weight") or _from_config(path, config)
    if wanted and None not in wanted and own not in (wanted, wanted[::-1]):
        yield f"{path} changes a weight of shape {list(own)}, the model's is {list(wanted)}"
    layers, match = _number(config, "num_hidden_layers", "n_layer"), LAYER.match(path)
    if _family(config) and layers and match and (len(match[1]) > 9 or int(match[1]) >= layers):
        yield f"{path} is beyond the model's {layers} layers"


def _from_config(path: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """(d, k) of a weight by the config of a known architecture, None for numbers it does not say; () for others."""
    family = _family(config)
    if family is None:
        return ()
    words, width = _number(config, "vocab_size"), _number(config, "hidden_size", "n_embd")
    heads = _number(config, "num_attention_heads", "n_head")
    shared = _number(config, "num_key_value_heads") or heads
    equal = width // heads if width and heads and family not in OWN_HEAD_SIZES else None
    size = _number(config, "head_dim") or equal
    inner = _number(config, "intermediate_size", "n_inner") or _times(4, _number(config, "n_embd"))
    query, key = _times(heads, size), _times(shared, size)
    both = query + 2 * key if query and key else None
    shapes: dict[str, tuple[int | None, ...]] = {
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (width, query),
        "self_attn.qkv_proj": (both, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "mlp.gate_up_proj": (_times(2, inner), width),
        "attn.c_attn": (_times(3, width), width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (inner, width),
        "mlp.c_proj": (width, inner),
        "embed_tokens": (width, words),
        "wte": (width, words),
        "lm_head": (words, width),
    }
    parts = path.split(".")
    return shapes.get(".".join(parts[-2:])) or shapes.get(parts[-1], ())


def _family(config: Mapping[str, Any]) -> str | None:
    return next((FAMILIES[name].name for name in architectures(config) if name in FAMILIES), None)


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of the fields that is a number above zero."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _times(one: int | None, other: int | None) -> int | None:
    return one * other if one and other else None
