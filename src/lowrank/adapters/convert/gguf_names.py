"""What llama.cpp calls the layers of a transformers model, and which rows it keeps in another order."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowrank.errors import CheckpointError, some
from lowrank.modelfiles.tied import architectures

# Names within a layer; `blk.N.` goes in front on llama.cpp's side.
GATED = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "lm_head": "output"}


@dataclass(frozen=True, slots=True)
class Family:
    """name: llama.cpp's for the architecture; stem: what stands in front of a layer's number; layer: names within one;

    outside: names of modules beside the layers; permuted: whether the rows of query and key are kept pair by pair;
    tied: whether the head is the embedding where config.json does not say.
    """

    name: str
    stem: str = "model.layers"
    layer: Mapping[str, str] = field(default_factory=lambda: GATED)
    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)
    permuted: bool = False
    tied: bool = False

    def gguf_name(self, path: str) -> str | None:
        """llama.cpp's name for the weight of the module at `path`, None where it has none."""
        if path in self.outside:
            return f"{self.outside[path]}.weight"
        match = re.fullmatch(rf"{re.escape(self.stem)}\.(\d+)\.(.+)", path)
        name = self.layer.get(match[2]) if match else None
        return f"blk.{match[1]}.{name}.weight" if match and name else None

    def path(self, gguf_name: str) -> str | None:
        """The inverse of `gguf_name`."""
        bare = gguf_name.removesuffix(".weight")
        for path, name in self.outside.items():
            if name == bare:
                return path
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", bare)
        found = [path for path, name in self.layer.items() if match and name == match[2]]
        return f"{self.stem}.{match[1]}.{found[0]}" if match and found else None


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", permuted=True),
    "MistralForCausalLM": Family("llama", permuted=True),
    "GraniteForCausalLM": Family("granite", permuted=True),
    "SmolLM3ForCausalLM": Family("smollm3", permuted=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "GemmaForCausalLM": Family("gemma", tied=True),
    "Gemma2ForCausalLM": Family("gemma2", tied=True),
    "Gemma3ForCausalLM": Family("gemma3", tied=True),
    "Phi3ForCausalLM": Family("phi3", layer=FUSED),
    "GPT2LMHeadModel": Family(
        "gpt2",
        stem="transformer.h",
        layer=GPT2,
        outside={"transformer.wte": "token_embd", "lm_head": "output"},
        tied=True,
    ),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model by its config.json. Raises CheckpointError for one that is not known here."""
    names = architectures(config)
    known = next((name for name in names if name in FAMILIES), None)
    if known is None:
        raise CheckpointError(
            f"the architecture {some(names) or 'of a model without a name'} is not known for GGUF: known are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[known]


def heads_of(config: Mapping[str, Any], path: str) -> int | None:
    """How many heads the rows of the query or key projection at `path` hold; None for other modules.

    Raises CheckpointError where the config does not say it.
    """
    fields = {"q_proj": ("num_attention_heads",), "k_proj": ("num_key_value_heads", "num_attention_heads")}
    wanted = fields.get(path.rpartition(".")[2])
    if wanted is None:
        return None
    for name in wanted:
        if type(config.get(name)) is int and config[name] > 0:
            return int(config[name])
    raise CheckpointError(f"the model's config.json does not say {wanted[-1]}, which {path} needs")


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """(d, r) from transformers' order of a head's rows (first halves, second halves) to llama.cpp's (pair by pair)."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_pairs`."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def check_rows(rows: Tensor, heads: int, path: str) -> None:
    """Raise CheckpointError where the rows are no whole number of pairs in every head."""
    if rows.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{path} has {rows.shape[0]} rows, which are no {heads} heads of pairs: is the model the adapter's base?"
        )
