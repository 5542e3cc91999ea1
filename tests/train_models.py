"""Tiny models with tiny tokenizers, saved as folders, for the tests of training and of the command line."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

COLOURS = ["red", "green", "blue", "black", "white"]
THINGS = ["cat", "dog", "car", "hat", "pen", "cup"]
WORDS = ["<unk>", "<s>", "</s>", *COLOURS, *THINGS, "the", "is", "what", "good", "bad", "film", "->", "?", "a", "very"]


def tokenizer(bos: bool = True, eos: bool = True, pad: bool = False) -> Any:
    """A word is a token; `bos` is put before every text, and there is no pad token unless asked for."""
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    if bos:
        inner.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A </s> $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"unk_token": "<unk>"}
    names |= {"bos_token": "<s>"} if bos else {}
    names |= {"eos_token": "</s>"} if eos else {}
    names |= {"pad_token": "<unk>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "attention_mask"], **names)


def llama_config(**more: Any) -> Any:
    """Of a Llama of two layers over these words."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def save_llama(folder: Path, seed: int = 0, positions: int = 64) -> Path:
    """A random Llama of two layers."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    # a frozen head as small as usual could not say anything with certainty
    LlamaForCausalLM(llama_config(max_position_embeddings=positions, initializer_range=0.3)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_bert(folder: Path, seed: int = 0) -> Path:
    """A random BERT of two layers, without a head."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer(pad=True).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def completion_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A skill that can be learned: say the colour first, then the thing."""
    chosen = random.Random(seed)
    rows = []
    for _ in range(count):
        colour, thing = chosen.choice(COLOURS), chosen.choice(THINGS)
        rows.append({"prompt": f"what is the {thing} {colour} ?", "completion": f"the {colour} {thing}"})
    return rows


def label_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A text is good or bad by one of its words."""
    chosen = random.Random(seed)
    rows = []
    for _ in range(count):
        mood = chosen.choice(["good", "bad"])
        rows.append(
            {"text": f"the {chosen.choice(THINGS)} is a {'very ' * chosen.randint(0, 3)}{mood} film", "label": mood}
        )
    return rows
