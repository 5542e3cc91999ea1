"""The model and rows on which TRL's DPO and ours are compared: waves for weights, the same on every machine."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train_models import llama_config

RANK, BETA = 3, 0.25
TARGETS = ["q_proj", "v_proj", "down_proj"]
ROWS = [
    {"prompt": "what is the cat red ?", "chosen": " the red cat", "rejected": " the cat is very red"},
    {"prompt": "what is black ?", "chosen": " a hat", "rejected": " the dog"},
    {"prompt": "the film is", "chosen": " very very good", "rejected": " bad"},
]


def wave(shape: Sequence[int], name: str, height: float = 0.3) -> Tensor:
    """Numbers that follow from the shape and the name alone."""
    count = torch.Size(shape).numel()
    return height * torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(name.encode()) % 1000).view(
        *shape
    ).to(torch.float32)


def plain_model() -> Any:
    """A Llama of two layers whose weights are waves."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama_config(max_position_embeddings=64, pad_token_id=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(wave(parameter.shape, name))
    return model
