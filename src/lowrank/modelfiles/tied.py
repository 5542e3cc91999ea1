"""An embedding and an output head that share one tensor, told from files alone.

A checkpoint stores a shared tensor once, under the embedding's name. What the head is then called follows from the
embedding's name; whether there is a head follows from the architecture that config.json names.
"""

import re
from collections.abc import Mapping
from typing import Any

# (the embedding's path, the head's); the first that matches the whole path counts.
HEADS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(embedding), head)
    for embedding, head in (
        (r"(model\.)?language_model\.embed_tokens", "lm_head"),
        (r"(.*\.)?model\.embed_tokens", r"\1lm_head"),
        (r"(.*\.)?model\.decoder\.embed_tokens", r"\1lm_head"),
        (r"(decoder\.)?embed_tokens", "lm_head"),
        (r"(.*\.)?transformer\.(?:wte|word_embeddings|tokens_embed)", r"\1lm_head"),
        (r"()(?:wte|word_embeddings|tokens_embed)", "lm_head"),
        (r"(.*\.)?(?:gpt_neox\.)embed_in", r"\1embed_out"),
        (r"(?:bert|deberta|ernie|nezha|megatron_bert)\.embeddings\.word_embeddings", "cls.predictions.decoder"),
        (r"(?:roberta|xlm_roberta|camembert)\.embeddings\.word_embeddings", "lm_head.decoder"),
        (r"distilbert\.embeddings\.word_embeddings", "vocab_projector"),
    )
)  # fmt: skip
HEADED = re.compile(r".*(ForCausalLM|LMHeadModel|LMHead|ForMaskedLM|ForPreTraining|ForConditionalGeneration)$")
EXPLICIT = "tie_word_embeddings"


def head_of(embedding: str) -> str | None:
    """The path of the output head that an embedding at this path is shared with, by the families' habits."""
    for pattern, head in HEADS:
        if match := pattern.fullmatch(embedding):
            return match.expand(head)
    return None


def has_head(config: dict[str, Any] | None) -> bool:
    """True where config.json names an architecture with an output head over the vocabulary."""
    return any(HEADED.fullmatch(name) for name in architectures(config))


def architectures(config: Mapping[str, Any] | None) -> list[str]:
    """The names of architectures in a config.json; empty where it has none, whatever it has in their place."""
    names = (config or {}).get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def shares_several(config: dict[str, Any] | None) -> bool:
    """True for encoder-decoders, where one table may serve an encoder, a decoder and a head under other names each."""
    return bool((config or {}).get("is_encoder_decoder"))


def may_be_tied(config: dict[str, Any] | None) -> bool:
    """False only where config.json says that embedding and head are two tensors."""
    owners = [config, (config or {}).get("text_config")]
    said = [owner[EXPLICIT] for owner in owners if isinstance(owner, dict) and EXPLICIT in owner]
    return all(said)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """The same config, saying that embedding and head are two tensors."""
    content = dict(config) | {EXPLICIT: False}
    if isinstance(content.get("text_config"), dict):
        content["text_config"] = dict(content["text_config"]) | {EXPLICIT: False}
    return content
