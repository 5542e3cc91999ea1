"""Small models with random weights, and what the tests of files do with them again and again."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.injection.adapters import lora_layers
from lowrank.layers.overrides import override_tensors

os.environ.setdefault("HF_HUB_OFFLINE", "1")
Answer = Callable[[nn.Module], Tensor]
WIDE = 0.2  # weights large enough that attention is not uniform, and so depends on queries and keys
IDS = torch.arange(3, 23).view(2, 10)


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=WIDE,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=32,
        initializer_range=WIDE,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=4,
        vocab_size=32,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=WIDE,
    )
    return _with_bias(GPT2LMHeadModel(config).eval())


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=32,
        num_labels=3,
        initializer_range=WIDE,
    )
    return _with_bias(BertForSequenceClassification(config).eval())


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=32, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=3,
        initializer_range=WIDE,
    )
    return _with_bias(ViTForImageClassification(config).eval())


class Convolutions(nn.Module):
    """One convolution of every dimension, strided and padded, the second one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(6, 9, 3, padding=1, groups=3)
        self.three = nn.Conv3d(3, 4, (1, 3, 1), padding=(0, 1, 0))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)  # (N, 6, 8)
        h = self.two(h.unflatten(2, (4, 2)).relu())  # (N, 9, 4, 2)
        h = self.three(h.unflatten(1, (3, 3)).relu())  # (N, 4, 3, 4, 2)
        return self.head(self.norm(h.flatten(2).mean(2)))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return _with_bias(Convolutions().eval())


def _with_bias(model: nn.Module) -> nn.Module:
    """In place: no bias stays zero, so that dropping one shows."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def answer(model: nn.Module) -> Tensor:
    """The model's output for a fixed input of its kind."""
    with torch.no_grad():
        if isinstance(_base(model), Convolutions):
            return model(torch.linspace(-2, 2, 128).sin().view(2, 4, 16))
        name = type(_base(model)).__name__
        if name.startswith("ViT"):
            return model(pixel_values=torch.linspace(-2, 2, 384).sin().view(2, 3, 8, 8)).logits
        if name.startswith("T5"):
            return model(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits
        return model(IDS).logits


def word_tokenizer() -> Any:
    """A fast tokenizer of transformers' for the small models: w3 to w31, split at white space."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "[END]": 2} | {f"w{i}": i for i in range(3, 32)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def disturb(model: nn.Module, adapter: str = "default", seed: int = 1) -> nn.Module:
    """In place: give every tensor of the adapter values as training would: B ≠ 0, magnitudes and copies moved."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        if adapter in layer.adapter_names:
            for tensor in layer.factors(adapter).trainable():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
    for module in model.modules():
        for tensor in override_tensors(module, adapter).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.2)
    return model


@torch.no_grad()
def disturb_peft(model: nn.Module, seed: int = 1) -> nn.Module:
    """In place: the same for a PEFT model, on everything that it trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.4, alpha=0.3)
    return model


@contextmanager
def silence() -> Iterator[None]:
    """Any warning in the block is an error, but those of packages that call each other's old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """{name: content} of the files in a folder."""
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the model's state."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def is_plain(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """True where the model has no adapter and the very state it had."""
    state = model.state_dict()
    return (
        not list(lora_layers(model))
        and state.keys() == before.keys()
        and all(torch.equal(state[key], tensor) for key, tensor in before.items())
    )
