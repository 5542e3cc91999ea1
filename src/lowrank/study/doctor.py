"""What this machine has, and how a model's adapted layers would be computed on it."""

import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.data.names import read_targets
from lowrank.errors import ConfigError
from lowrank.hub import JSON
from lowrank.injection.apply import inject
from lowrank.injection.config import LoraConfig
from lowrank.injection.paths import execution_paths, shared_inputs
from lowrank.injection.plan import InjectionPlan
from lowrank.kernels import pieces
from lowrank.kernels.onednn import is_faster_here
from lowrank.kernels.order import FEW_ROWS, choose_order
from lowrank.kernels.processor import half_products_are_slow, warning_of_slow_products
from lowrank.layers.base import dimensions, lora_mixin
from lowrank.layers.stack import LoraStack
from lowrank.stages import stage
from lowrank.study.empty import empty_model
from lowrank.train.models import find_model

PACKAGES = ("lowrank", "torch", "transformers", "safetensors", "peft", "accelerate", "triton")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_TOKENS = 1_000_000
PROBE = 1024  # the side of the square product that is timed


def describe_machine() -> dict[str, str]:
    """Versions, processor and accelerator, and how fast half precision is here beside float32, measured."""
    facts = {name: _version(name) for name in PACKAGES}
    facts["python"] = platform.python_version()
    facts["cpu"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    facts["float32"] = "gradients by oneDNN, faster than MKL on this AMD processor" if is_faster_here() else "by torch"
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    single = product_seconds(torch.float32, device)
    for name in ("bfloat16", "float16"):
        share = product_seconds(DTYPES[name], device) / single
        slow = warning_of_slow_products(DTYPES[name], device)
        verdict = slow or ("use it" if share < 0.8 else "no gain here")
        facts[name] = f"{PROBE}×{PROBE} product in {share:.2f} of float32's time on this {device}: {verdict}"
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def product_seconds(dtype: torch.dtype, device: str) -> float:
    """The best of five products of two square matrices, or of those that a second is enough for."""
    stage(f"measuring products in {str(dtype).removeprefix('torch.')}")
    x = torch.ones(PROBE, PROBE, dtype=dtype, device=device)
    taken: list[float] = []
    while len(taken) < 5 and sum(taken) < 1:
        taken.append(_timed(lambda: x @ x, device))
    return min(taken)


def _timed(job: Callable[[], Tensor], device: str) -> float:
    start = time.perf_counter()
    job()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one shape and path: how many, (d, k), "fused" or why not, and how the forward products are computed."""

    name: str
    count: int
    shape: tuple[int, int]
    path: str
    order: str


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """The plan, the layers grouped by name and path, and the groups that share an input. Prints as text."""

    plan: InjectionPlan
    groups: tuple[LayerGroup, ...]
    sharing: tuple[tuple[tuple[str, ...], int], ...]
    unknown: str

    def as_dict(self) -> dict[str, Any]:
        """Everything in JSON's types."""
        return {
            "summary": self.plan.summary(),
            "layers": [asdict(group) for group in self.groups],
            "sharing": [{"modules": list(names), "times": times} for names, times in self.sharing],
        }

    def __str__(self) -> str:
        """One line a kind of layer, one a kind of sharing, and the plan's summary."""
        lines = [
            f"{g.count:>4} × {g.name:<16} {f'{g.shape[0]}×{g.shape[1]}':<12} {g.path}"
            + (f"; {g.order}" if g.order else "")
            for g in self.groups
        ]
        lines += [
            f"{times:>4} × {', '.join(names)} share an input: computed together (on a CPU from {FEW_ROWS} tokens on)"
            for names, times in self.sharing
        ]
        return "\n".join([*lines, *([self.unknown] if self.unknown else []), self.plan.summary()])


def describe_model(name: str, targets: str | None, rank: int, tokens: int, dtype: str) -> ModelPaths:
    """How the layers of a model would be computed: built from its config without weights, injected, called once.

    Raises ConfigError for a dtype that is not known, and what `inject` raises for targets that match nothing.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if not 1 <= tokens <= MOST_TOKENS:
        raise ConfigError(f"--tokens {tokens}: a batch has at least one token, and at most {MOST_TOKENS:,} are tried")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=read_targets(targets))
    model = empty_model(find_model(name, JSON), DTYPES[dtype])
    plan = inject(model, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds: Counter[tuple[str, tuple[int, int], str, str]] = Counter()
    for entry in execution_paths(model):
        d, k = dimensions(lora_mixin(entry.layer), entry.layer)
        few = device == "cpu" and tokens < FEW_ROWS and not half_products_are_slow(DTYPES[dtype])
        plain = entry.reason or (f"plain, as {tokens} tokens are fewer than {FEW_ROWS}" if few else "")
        together = plain or isinstance(entry.layer, LoraStack)  # its products go with the module of experts' own
        order = "" if together else _products(tokens, k, d, rank, DTYPES[dtype], device)
        kinds[_leaf(entry.path), (d, k), plain or "fused", order] += 1
    groups = tuple(LayerGroup(leaf, n, shape, path, order) for (leaf, shape, path, order), n in kinds.items())
    return ModelPaths(plan, groups, *_sharing(model))


def _products(tokens: int, k: int, d: int, rank: int, dtype: torch.dtype, device: str) -> str:
    """How the products of a fused layer are computed at this shape."""
    order = choose_order(tokens, k, d, rank, dtype, device).why
    cut = pieces.explain(tokens, k, d, dtype) if device == "cpu" else ""
    return f"{order}; {cut}" if cut else order


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _sharing(model: nn.Module) -> tuple[tuple[tuple[tuple[str, ...], int], ...], str]:
    """The kinds of groups that share an input with how often each occurs, and why they are not known, if so."""
    tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    try:
        found = shared_inputs(model, lambda: model(**inputs))
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return (), f"shared inputs: unknown, the model cannot be called without weights ({str(error).splitlines()[0]})"
    counts = Counter(tuple(_leaf(path) for path in group) for group in found)
    return tuple(counts.items()), ""
