"""What needs no score: the start, latency after merging, sizes, subspaces and amplification."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RUNS, Result, kept, minilm
from tasks import QV
from torch import nn

import lowrank
from lowrank.analysis.inspection import inspect_adapter

ROUNDS = 15


def measure_all(again: bool = False) -> None:
    """Every result that is not there yet. What reads a kept training is left out where the training is not there."""
    command = "python scripts/paper"
    kept("start", start, command, again)
    kept("latency", latency, command, again)
    kept("step", step, command, again)
    if adapter("qv-r8").is_dir():
        kept("size", size, command, again)
        kept("amplification", amplification, command, again)
    if adapter("qv-r8").is_dir() and adapter("qv-r64", 1).is_dir():
        # another seed: with the same one, the first A of both would start from the same random numbers
        kept("phi-ranks", lambda: phi("qv-r8", 0, "qv-r64", 1), command, again)
    if adapter("qv-r64").is_dir() and adapter("qv-r64", 1).is_dir():
        kept("phi-seeds", lambda: phi("qv-r64", 0, "qv-r64", 1), command, again)


def adapter(job: str, seed: int = 0) -> Path:
    """The folder of a kept training."""
    return RUNS / f"sst2-{job}-seed{seed}"


def encoder() -> Any:
    """MiniLM without a head, in eval mode."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm()).eval()


def batch(rows: int = 16, length: int = 64) -> torch.Tensor:
    """Token numbers (rows, length), seeded."""
    return torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(0))


def adapt(model: nn.Module) -> None:
    """r = 8 on query and value."""
    torch.manual_seed(0)
    lowrank.inject(model, lowrank.LoraConfig(r=8, lora_alpha=16, target_modules=QV.split(",")))


def wake(model: nn.Module) -> None:
    """Give every B values, so that ΔW is not 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.02)


@torch.no_grad()
def start() -> Result:
    """Whether the output is the base's bit for bit after injection."""
    model, ids = encoder(), batch()
    before = model(ids).last_hidden_state
    adapt(model)
    return {"equal": bool(torch.equal(before, model(ids).last_hidden_state)), "seed": 0}


@torch.no_grad()
def latency() -> Result:
    """Forward time of the adapted and the merged model over the base's: median of the rounds, the jobs in turns."""
    base, adapted, merged = encoder(), encoder(), encoder()
    for model in (adapted, merged):
        adapt(model)
        wake(model)
    merged = lowrank.merge_and_unload(merged)
    jobs = {"base": base, "unmerged": adapted, "merged": merged}
    times = in_turns({name: lambda model=model: model(batch()) for name, model in jobs.items()})
    return {"shape": [16, 64], "rounds": ROUNDS, **ratios(times, "base")}


def step() -> Result:
    """One training step (forward, backward, AdamW) in turns, and the memory it takes in a process of its own."""
    jobs, trained = {}, {}
    for name in ("full", "lora"):
        job, parameters = training(name)
        jobs[name], trained[name] = job, sum(p.numel() for p in parameters)
    times = in_turns(jobs)
    return {
        "shape": [16, 64],
        "rounds": ROUNDS,
        "trained": trained,
        "peak_bytes": {name: peak(name) for name in jobs},
        **ratios(times, "full"),
    }


def training(name: str) -> tuple[Callable[[], None], list[nn.Parameter]]:
    """(one step, what it trains): "lora" or "full"."""
    model = encoder()
    if name == "lora":
        adapt(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters)

    def one() -> None:
        model(batch()).last_hidden_state.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return one, parameters


def peak(name: str) -> int:
    """Bytes resident at the peak of three steps in a new process, beyond what it held before the model was loaded."""
    command = [sys.executable, __file__, name]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return int(out.stdout)


def measure_peak(name: str) -> int:
    """What `peak` asks its process for."""
    from transformers import AutoModel  # noqa: F401  counted among what was there before

    before = _resident_peak()
    one, _ = training(name)
    for _ in range(3):
        one()
    return _resident_peak() - before


def _resident_peak() -> int:
    """Bytes; as Linux counts it for this program alone (getrusage's figure is inherited from the parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def in_turns(jobs: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each job in each round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(ROUNDS + 2):
        for name, job in jobs.items() if round_ % 2 else reversed(jobs.items()):
            began = time.perf_counter()
            job()
            if round_ >= 2:
                times[name].append(time.perf_counter() - began)
    return times


def ratios(times: dict[str, list[float]], floor: str) -> Result:
    """Median seconds, and the median over the rounds of job/floor within the round."""
    return {
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(taken, times[floor], strict=True))
            for name, taken in times.items()
        },
    }


def size() -> Result:
    """Bytes of the saved adapter, with its head, beside the base's weights."""
    saved = sum(file.stat().st_size for file in adapter("qv-r8").glob("*.safetensors"))
    base = sum(file.stat().st_size for file in minilm().glob("*.safetensors"))
    return {"adapter_bytes": saved, "base_bytes": base, "ratio": base / saved}


def phi(job: str, seed: int, other: str, other_seed: int) -> Result:
    """φ(1, 1) and φ(8, 8) of A, the mean over the modules, beside what random directions give."""
    inspection = inspect_adapter(adapter(job, seed), against=adapter(other, other_seed))
    found = [layer.against.a for layer in inspection.layers if layer.against and layer.against.a]
    return {
        "pair": [f"{job} seed {seed}", f"{other} seed {other_seed}"],
        "modules": len(found),
        "phi": {str(n): statistics.mean(one.at(n) for one in found) for n in (1, 8)},
        "random": {str(n): statistics.mean(n / one.dimension for one in found) for n in (1, 8)},
    }


def amplification() -> Result:
    """‖ΔW‖_F/‖UᵀW0V‖_F of r = 8, and the norms in W0's own and in random directions; medians over the modules."""
    found = [
        layer.base.amplification
        for layer in inspect_adapter(adapter("qv-r8"), model=minilm()).layers
        if layer.base and layer.base.amplification
    ]
    names = ("change", "along_change", "along_own", "along_random", "factor")
    return {"modules": len(found), **{name: statistics.median(getattr(one, name) for one in found) for name in names}}


if __name__ == "__main__":
    print(measure_peak(sys.argv[1]))
