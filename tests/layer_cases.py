"""One layer of every kind and setting, in a model that holds nothing else, and adapters for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lowrank
from lowrank import LoraConfig
from lowrank.core.factors import LoraFactors
from lowrank.injection.adapters import lora_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOCABULARY = 13

CONFIGS = (  # alpha is nowhere the rank, and no two scales or ranks are equal
    {"r": 3, "lora_alpha": 5},
    {"r": 2, "lora_alpha": 7},
    {"r": 4, "lora_alpha": 3, "use_rslora": True},
)
NAMES = ("one", "v2.1", "three")


class MatmulLinear(nn.Linear):
    """A Linear subclass that computes its answer in its own way, as FalconLinear does."""

    def forward(self, input: Tensor) -> Tensor:
        """x @ Wᵀ + bias in two steps."""
        return torch.matmul(input, self.weight.T) + self.bias


class ScaledEmbedding(nn.Embedding):
    """A lookup that multiplies what it finds, as Gemma's and BART's do."""

    def __init__(self, *args: int, embed_scale: float, **options: int) -> None:
        super().__init__(*args, **options)
        self.embed_scale = embed_scale

    def forward(self, input: Tensor) -> Tensor:
        """E[i]·embed_scale."""
        return super().forward(input) * self.embed_scale


class BufferScaledEmbedding(nn.Embedding):
    """The same with the scale in a buffer, as transformers' Gemma has it."""

    def __init__(self, *args: int, embed_scale: float) -> None:
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """E[i]·embed_scale, the scale in the table's dtype."""
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


def conv1d_linear(d: int, k: int) -> nn.Module:
    """transformers' Conv1D with a bias that is not zero."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(d, k)
    nn.init.normal_(layer.weight, std=k**-0.5)
    nn.init.normal_(layer.bias)
    return layer


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of its input; lookups have ids instead of numbers."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def input(self, dtype: torch.dtype) -> Tensor:
        """Random numbers, or ids that include the padding id and repetitions."""
        if isinstance(self.make(), nn.Embedding):
            return torch.randint(VOCABULARY, self.shape)
        return torch.randn(self.shape, dtype=torch.float32).to(dtype)


CASES: dict[str, LayerCase] = {
    "linear": LayerCase(lambda: nn.Linear(7, 9), (2, 5, 7)),
    "linear, one vector": LayerCase(lambda: nn.Linear(7, 9), (7,)),
    "linear, no bias": LayerCase(lambda: nn.Linear(7, 9, bias=False), (4, 7)),
    "own forward": LayerCase(lambda: MatmulLinear(7, 9), (2, 5, 7)),
    "conv1d-linear": LayerCase(lambda: conv1d_linear(9, 7), (2, 5, 7)),
    "embedding": LayerCase(lambda: nn.Embedding(VOCABULARY, 6), (2, 5)),
    "embedding, padded": LayerCase(lambda: nn.Embedding(VOCABULARY, 6, padding_idx=2), (4, 9)),
    "embedding, scaled": LayerCase(lambda: ScaledEmbedding(VOCABULARY, 6, embed_scale=2.5, padding_idx=1), (2, 5)),
    "embedding, scale in a buffer": LayerCase(lambda: BufferScaledEmbedding(VOCABULARY, 6, embed_scale=2.5), (2, 5)),
    "conv1d": LayerCase(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d, same": LayerCase(lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), (2, 4, 9)),
    "conv2d": LayerCase(lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1)), (2, 4, 6, 7)),
    "conv2d, circular": LayerCase(
        lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular", dilation=(1, 2)), (2, 4, 6, 7)
    ),
    "conv2d, reflect": LayerCase(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 7)),
    "conv2d, replicate": LayerCase(
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate", bias=False), (2, 4, 5, 4)
    ),
    "conv2d, groups": LayerCase(lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 6)),
    "conv2d, depthwise": LayerCase(lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), (2, 4, 7, 6)),
    "conv2d, no batch": LayerCase(lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    "conv3d": LayerCase(
        lambda: nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), groups=2), (1, 4, 3, 4, 5)
    ),
}
CASES_WITH_DORA = {name: CASES[name] for name in ("linear", "linear, no bias", "own forward", "conv1d-linear")}


class Holder(nn.Module):
    """A model with one layer worth adapting, and one that is not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's answer."""
        return self.layer(x)


def holder(name: str, dtype: torch.dtype = torch.float32) -> tuple[Holder, Tensor]:
    """The case's layer in a model, and an input for it."""
    case = CASES[name]
    return Holder(case.make().to(dtype)).to(dtype).eval(), case.input(dtype)


def inject_all(model: nn.Module, count: int, **settings: object) -> list[LoraFactors]:
    """In place: give the model's `layer` the first `count` adapters, all active, with ΔW ≠ 0."""
    for name, config in zip(NAMES[:count], CONFIGS, strict=False):
        options = {"init_lora_weights": "random", **config, **settings}
        lowrank.inject(model, LoraConfig(target_modules=["layer"], **options), name)
    lowrank.set_active(model, NAMES[:count], trainable=NAMES[:count])
    adapters = factors_of(model)
    with torch.no_grad():
        for factors in adapters:
            factors.b *= 3  # a change as large as the weight, so that half types cannot hide it
    return adapters


def factors_of(model: nn.Module) -> list[LoraFactors]:
    """All factors of all adapted layers."""
    return [layer.factors(name) for _, layer in lora_layers(model) for name in layer.adapter_names]


@torch.no_grad()
def move(adapters: Sequence[LoraFactors], by: float = 0.3) -> None:
    """In place: as if training had moved every trained tensor."""
    for factors in adapters:
        for tensor in factors.trainable():
            tensor += by * tensor.abs().mean().clamp_min(0.1) * torch.randn_like(tensor)


class Chain(nn.Module):
    """Three layers one after another, so that a merge can stop half way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """tanh between the layers."""
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def chain(*names: str) -> tuple[Chain, Tensor]:
    """A chain with the named adapters, all active, ΔW ≠ 0."""
    model = Chain().eval()
    for i, name in enumerate(names):
        config = LoraConfig(
            r=2 + i, lora_alpha=5, target_modules=["first", "second", "third"], init_lora_weights="random"
        )
        lowrank.inject(model, config, name)
    if names:
        lowrank.set_active(model, names)
    return model, torch.randn(4, 6)
