"""What the benchmarks share: the Llama-shaped model, taking turns, the conditions of a run, the result file."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and the batch it is trained on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    rows: int = 4
    length: int = 256


SHAPES = {
    "6x768": Shape(6, 768, 2048, 12, 12),
    "6x768-256": Shape(6, 768, 2048, 12, 12, rows=1),  # the small steps that people take on a CPU
    "2x2048": Shape(2, 2048, 5632, 32, 32),
    "1x8b": Shape(1, 4096, 14336, 32, 8, length=2048),  # a layer of Llama-3-8B, 8,192 tokens
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"all": ALL_LINEAR, "qv": ["q_proj", "v_proj"]}
RANK, ALPHA = 16, 32
VOCABULARY = 1024
WARM_UP = 8  # steps

Job = Callable[[], Tensor]


def token_ids(shape: str = "6x768", device: str = "cpu") -> Tensor:
    """One batch of tokens, (rows, length), the same each time."""
    size = (SHAPES[shape].rows, SHAPES[shape].length)
    return torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(2)).to(device)


def base_model(shape: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """The frozen Llama-shaped model, the same numbers each time."""
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * sizes.length,
    )
    return transformers.LlamaForCausalLM(config).to(device, dtype).requires_grad_(False)


def training_job(model: nn.Module, ids: Tensor) -> Job:
    """Forward and backward of whatever requires gradients in the model."""

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    step.weights = weights_of(model)
    return step


def floor_job(model: nn.Module, ids: Tensor) -> Job:
    """Forward and the gradient with respect to the input embeddings, all weights frozen."""
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> Tensor:
        embeds.grad = None
        loss: Tensor = model(inputs_embeds=embeds, labels=ids).loss
        loss.backward()
        return loss

    step.weights = weights_of(model)
    return step


def weights_of(model: nn.Module) -> set[int]:
    """Where the model's own tensors lie."""
    return {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}


def clock_for(threads: int, device: str = "cpu") -> Callable[[], float]:
    """The process's own time with one thread, which other programs disturb little; the wall's with more or a GPU."""
    if device != "cpu":
        return after_the_gpu
    return time.process_time if threads == 1 else time.perf_counter


def after_the_gpu() -> float:
    """The wall's time when all that was asked of the GPU is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(jobs: dict[str, Job], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every job in every round, in another order each round, so that a noisy minute strikes all.

    The first steps of a job are not counted: torch fills its caches in them, and lowrank learns which layers share an
    input and how products are best cut, as it does in the first steps of a training run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for step in jobs.values():
        for _ in range(WARM_UP):
            step()
    names = list(jobs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = clock()
            jobs[name]()
            seconds[name].append(clock() - started)
    return seconds


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, float]:
    """The median over the rounds of each job's time over that of `to` in the same round."""
    return {
        name: round(statistics.median(a / b for a, b in zip(runs, seconds[to], strict=True)), 4)
        for name, runs in seconds.items()
        if name != to
    }


def conditions(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": cpu,
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "bf16": [name for name in ("avx512_bf16", "amx_bf16") if name in flags],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
        "load_average": os.getloadavg(),
    }


def keep(report: dict[str, Any], out: Path | None) -> None:
    """Write the result where it is asked for."""
    report["conditions"]["load_average_after"] = os.getloadavg()
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
