"""Small models under PEFT, as the tests of `lowrank.peft` need them: alpha ≠ r, B ≠ 0, biases ≠ 0."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lowrank.peft.layer
from lowrank.kernels.together import Operands

RANK, ALPHA = 4, 10
IDS = torch.tensor([[5, 9, 2, 31, 7, 7], [40, 1, 3, 8, 22, 30]])


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attention_bias=True,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=64,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


BASES: dict[str, Callable[[], nn.Module]] = {"llama": _llama, "gpt2": _gpt2, "bert": _bert, "t5": _t5}
TARGETS: dict[str, str | list[str]] = {
    "llama": "all-linear",
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}


def base_model(kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Module:
    """A random model with no zero bias in it."""
    torch.manual_seed(seed)
    model = BASES[kind]()
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(tensor, std=0.1)
    return model.to(dtype)


def config(kind: str = "llama", **fields: object) -> peft.LoraConfig:
    """LoRA on every linear layer with alpha ≠ r, unless told otherwise."""
    return peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS[kind], **fields})


def stir(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Random numbers in every adapter tensor, so that no term is zero."""
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(tensor, std=std)
    return model


def peft_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
    """A model under plain PEFT with an adapter that does something."""
    return stir(peft.get_peft_model(base_model(kind, dtype), config(kind, **fields)))


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(the plain model, an accelerated copy)."""
    fast = copy.deepcopy(model)
    lowrank.peft.accelerate(fast)
    return model, fast


def answer(model: nn.Module, **inputs: object) -> Tensor:
    """The logits for IDS."""
    return model(input_ids=IDS, **({"labels": IDS} | inputs)).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the loss in every trained parameter, by name."""
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(plain: nn.Module, fast: nn.Module, **inputs: object) -> None:
    """Answers and gradients agree to float32's rounding; dtypes and trained parameters are the same."""
    torch.testing.assert_close(answer(fast, **inputs), answer(plain, **inputs), rtol=1e-4, atol=1e-5)
    want, got = gradients(plain), gradients(fast)
    assert want.keys() == got.keys()
    for name in want:
        size = float(want[name].abs().max())
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5 * max(size, 1e-3), msg=name)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often the fused function answers: the ranks it was given, in order."""
    ranks: list[int] = []
    original = lowrank.peft.layer.projection

    def counting(layer: nn.Module, x: Tensor, own: Operands, share_mask: bool) -> Tensor:
        ranks.append(own.a.shape[0])
        return original(layer, x, own, share_mask)

    with monkeypatch.context() as patch:
        patch.setattr(lowrank.peft.layer, "projection", counting)
        yield ranks
