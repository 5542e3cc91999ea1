"""Quantised layers and models for tests, and bitsandbytes' own dense copy of their weights as the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
import models
from lowrank import LoraConfig
from lowrank.injection.adapters import lora_layers

SCHEMES = ("nf4", "nf4 double", "fp4", "int8")
CHECKPOINTS: dict[str, dict[str, Any]] = {  # by scheme, what transformers is told
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def quantised_linear(scheme: str, k: int, d: int, dtype: torch.dtype, weight: Tensor | None = None) -> Any:
    """A quantised Linear with a bias that is not zero; (d, k) = (d, k) of `weight` where that is given."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(d, k).div(k**0.5).to(dtype) if weight is None else weight
    kind, _, double = scheme.partition(" ")
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(k, d, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(k, d, quant_type=kind, compress_statistics=bool(double))
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type=kind, compress_statistics=bool(double), module=layer
        )
    layer.bias = nn.Parameter(torch.randn(d).to(dtype))
    return layer.to("cpu").requires_grad_(False)


def oracle(layer: Any) -> Tensor:
    """The matrix as bitsandbytes gives it."""
    import bitsandbytes.functional as bnb

    if layer.weight.dtype is torch.int8:
        return bnb.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    return dequantised(layer.weight.data, layer.weight.quant_state)


def dequantised(packed: Tensor, state: Any) -> Tensor:
    """bitsandbytes' matrix of four bits, by its plain kernel where that for AVX-512 takes scales of other blocks."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    if state.shape[1] % state.blocksize == 0:
        return bnb.dequantize_4bit(packed, state)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    with torch.compiler.set_stance("force_eager"):  # compiled for AVX2 on a processor with AVX-512, it gives garbage
        return _dequantize_4bit_compute(
            packed.view(torch.uint8).flatten(), absmax.float(), state.code, state.blocksize, state.shape, state.dtype
        )


class Pair(nn.Module):
    """Two quantised layers that read one input, and a third behind them."""

    def __init__(self, scheme: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.left = quantised_linear(scheme, 64, 96, dtype)
        self.right = quantised_linear(scheme, 64, 96, dtype)
        self.out = quantised_linear(scheme, 96, 48, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., 64) → (..., 48)."""
        return self.out(torch.tanh(self.left(x)) * self.right(x))


def quantise(model: nn.Module, scheme: str) -> nn.Module:
    """In place: every Linear of the model but its head is quantised, from the weights it has."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in path:
            new = quantised_linear(scheme, module.in_features, module.out_features, module.weight.dtype, module.weight)
            new.bias = module.bias
            new.support_avx512bf16_for_cpu = False  # it would answer in bfloat16 on processors that have this
            model.set_submodule(path, new)
    return model


def llama(scheme: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small quantised Llama whose rows fill their blocks, without which bitsandbytes' own layers err with AVX-512."""
    return quantise(models.causal("llama", hidden_size=64, intermediate_size=128).to(dtype), scheme)


def checkpoint(root: Path, scheme: str) -> Path:
    """In `root`: a checkpoint as transformers writes it, quantised, under `base`, the model before under `float`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    models.causal("llama", hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(root / "float")
    told = BitsAndBytesConfig(**CHECKPOINTS[scheme])
    model = AutoModelForCausalLM.from_pretrained(root / "float", dtype=torch.bfloat16, quantization_config=told)
    model.save_pretrained(root / "base", max_shard_size="40kB")
    return root


def load(folder: Path) -> Any:
    """The model in a folder, in bfloat16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def adapted(folder: Path, out: Path, size: float = 0.1, **options: Any) -> Any:
    """The model in a folder with a trained adapter, which is saved to `out`."""
    model = load(folder)
    lowrank.inject(model, LoraConfig(**({"r": 4, "lora_alpha": 6} | options)))
    for _, layer in lora_layers(model):
        for tensor in layer.factors("default").trainable():
            tensor.data += size * torch.randn_like(tensor)
    lowrank.save_adapter(model, out)
    return model
