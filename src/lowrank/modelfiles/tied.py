"""An embedding and an output head that share one tensor, told from files alone.

A checkpoint stores a shared tensor once, under the embedding's name. What the head is then called follows from the
embedding's name; whether there is a head follows from the architecture that config.json names.
"""

import re
from collections.abc import Mapping
from typing import Any

# Encoders by where their heads are, as transformers 5.23 declares it in `_tied_weights_keys`.
CLS = (
    "bert|deberta|ernie|nezha|megatron_bert|rembert|roformer|nystromformer|mra|yoso|tapas|layoutlm|visual_bert|roc_bert"
)
CLS += "|fnet|lxmert|nomic_bert|mobilebert|transformer"  # the last is SqueezeBERT's
LM_HEAD = "roberta|xlm_roberta|camembert|data2vec_text|esm|gte|ibert|longformer|mpnet|roberta_prelayernorm"

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
        (r"(.*\.)?(?:gpt_neox\.|gpt_neox_japanese\.)embed_in", r"\1embed_out"),
        (rf"(?:{CLS})\.embeddings\.word_embeddings", "cls.predictions.decoder"),
        (rf"(?:{LM_HEAD})\.embeddings\.word_embeddings", "lm_head.decoder"),
        (r"distilbert\.embeddings\.word_embeddings", "vocab_projector"),
        (r"albert\.embeddings\.word_embeddings", "predictions.decoder"),
        (r"(?:electra|convbert)\.embeddings\.word_embeddings", "generator_lm_head"),
        (r"funnel\.embeddings\.word_embeddings", "lm_head"),
        (r"git\.embeddings\.word_embeddings", "output"),
        (r"backbone\.embeddings", "lm_head"),
        (r"(?:model\.)?text_model\.embed_tokens", "lm_head"),
        (r"model\.embeddings\.tok_embeddings", "decoder"),
        (r"biogpt\.embed_tokens", "output_projection"),
        (r"rwkv\.embeddings", "head"),
        (r"transformer\.w", "lm_head"),
        (r"transformer\.embeddings", "pred_layer.proj"),
        (r"transformer\.word_embedding", "lm_loss"),
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
