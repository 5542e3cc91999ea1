"""Models that say what a test wants: every token is followed by the one that a chain says, whatever stood before."""

from pathlib import Path
from typing import Any

import torch

from chat_templates import byte_tokenizer


def save_chain(folder: Path, template: str | None, *said: str, positions: int = 256) -> Path:
    """A Llama over bytes that adds nothing to the embeddings: the head reads the last token alone.

    said: runs of tokens, each following the one before; special tokens are one token. The last one follows itself.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(template)
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        for run in said:
            ids = tokenizer(run, add_special_tokens=False)["input_ids"]
            for token, following in zip(ids, [*ids[1:], ids[-1]], strict=True):
                model.lm_head.weight[following, token] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
