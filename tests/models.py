"""Small transformers models with random weights: every bias is moved off zero, no two layers are alike."""

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 32
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.tensor([[5, 9, 3, 17, 30, 4], [8, 8, 21, 11, 6, 29]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8).sin()

EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2},
    "t5": {"d_kv": 4, "d_ff": 24, "num_decoder_layers": 2, "decoder_start_token_id": 0},
    "vit": {"image_size": 8, "patch_size": 4},
}


def config(model_type: str, **options: Any) -> Any:
    """A small config of the type."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**SMALL, **EXTRA.get(model_type, {}), **options})


@torch.no_grad()
def _off_zero(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def build(auto: str, model_type: str, **options: Any) -> nn.Module:
    """A model of an Auto class, e.g. build("AutoModelForCausalLM", "gpt2", n_embd=8)."""
    import transformers

    torch.manual_seed(0)
    return _off_zero(
        getattr(transformers, auto).from_config(config(model_type, **options), attn_implementation="eager")
    )


def causal(model_type: str, **options: Any) -> nn.Module:
    """A small causal language model."""
    return build("AutoModelForCausalLM", model_type, **options)


class ConvNet(nn.Module):
    """Convolutions as in image models, a depthwise one among them, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 5)."""
        x = torch.relu(self.stem(pixels))
        x = torch.relu(self.pointwise(torch.relu(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


def convnet() -> nn.Module:
    """A small image model without transformers."""
    torch.manual_seed(0)
    return ConvNet().eval()


MODELS = {
    "llama": lambda: causal("llama"),
    "gpt2": lambda: causal("gpt2"),
    "bert": lambda: build("AutoModelForSequenceClassification", "bert", num_labels=3),
    "t5": lambda: build("AutoModelForSeq2SeqLM", "t5"),
    "vit": lambda: build("AutoModelForImageClassification", "vit", num_labels=3),
    "mixtral": lambda: causal("mixtral"),
    "convnet": convnet,
}


def answer(model: nn.Module) -> Tensor:
    """The model's scores for a fixed input of its kind."""
    if isinstance(model, ConvNet):
        return model(PIXELS)
    if model.config.model_type == "vit":
        return model(pixel_values=PIXELS).logits
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits
    return model(input_ids=IDS).logits
