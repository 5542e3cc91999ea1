"""Claim: a LoRA training step takes at most 1.08× the frozen model's in bf16 and 1.05× in float32 (6×768, all-linear).

Every job is the same Llama-shaped model of random weights on the same 4×256 tokens, forward and backward, in one
process; the jobs take turns, in another order each round.

floor        all weights frozen: forward and the gradient with respect to the input embeddings
lowrank      rank 16 by lowrank.inject
peft         rank 16 under PEFT, as `get_peft_model` makes it
accelerated  the same after lowrank.peft.accelerate
unsloth      rank 16 in Unsloth's order of products, a Linear at a time (`peer_orders`)
full         every weight trained

    python benchmarks/training_step.py [--runs 9] [--threads 2] [--dtype bf16 f32] [--shape 6x768 2x2048]
                                 [--targets all qv] [--jobs ...] [--out benchmarks/results/training_step.json]

With `--device cuda` the model is one layer of Llama-3-8B on 8,192 tokens, unless --shape says otherwise.

A ratio is the median over the rounds of job/floor within the round. The memory figures are the bytes that autograd
keeps for backward beyond the floor's, against the least there is: one x per shared input, and S.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import (
    ALPHA,
    DTYPES,
    RANK,
    SHAPES,
    TARGETS,
    Job,
    base_model,
    clock_for,
    conditions,
    floor_job,
    keep,
    ratios,
    take_turns,
    token_ids,
    training_job,
)
from peer_orders import in_unsloths_order
from torch import Tensor, nn

import lowrank

JOBS = ("floor", "lowrank", "peft", "accelerated", "unsloth", "full")
ON = {"cpu": ["6x768", "2x2048"], "cuda": ["1x8b"]}


def job_of(name: str, shape: str, dtype: torch.dtype, targets: list[str], ids: Tensor, dropout: float = 0.0) -> Job:
    """A job by its name, where the tokens are; no factor is zero."""
    model = base_model(shape, dtype, ids.device.type)
    if name == "floor":
        return floor_job(model, ids)
    if name == "full":
        return training_job(model.requires_grad_(True), ids)
    return training_job(adapted(name, model, targets, dropout), ids)


def adapted(name: str, model: nn.Module, targets: list[str], dropout: float = 0.0) -> nn.Module:
    """The model with a rank-16 adapter by "lowrank", "peft", PEFT "accelerated", or in "unsloth"'s order."""
    if name == "unsloth":
        return _filled(in_unsloths_order(model, targets, RANK, ALPHA / RANK))
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "lora_dropout": dropout}
    if name == "lowrank":
        lowrank.inject(model, lowrank.LoraConfig(**settings))
        return _filled(model)
    import peft

    wrapped: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**settings))
    if name == "accelerated":
        lowrank.peft.accelerate(wrapped)
    return _filled(wrapped)


def _filled(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(tensor, std=0.01)
    return model


def kept_bytes(step: Job) -> int:
    """Bytes of the tensors autograd keeps for backward in one step, each storage once, the model's own weights not."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in step.weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        step()
    return sum(kept.values())


def measured(what: dict[str, Any], jobs: dict[str, Job], runs: int, clock: Callable[[], float]) -> dict[str, Any]:
    """The jobs by turns, as one line of a table: `what` was measured, printed too."""
    memory = {name: kept_bytes(step) for name, step in jobs.items()}
    seconds = take_turns(jobs, runs, clock)
    line = what | {
        "clock": clock.__name__,
        "floor_s": round(statistics.median(seconds["floor"]), 4),
        "over_floor": ratios(seconds, "floor"),
        "kept_MB_beyond_floor": {n: round((b - memory["floor"]) / 1e6, 2) for n, b in memory.items() if n != "floor"},
        "runs_s": {name: [round(s, 4) for s in runs] for name, runs in seconds.items()},
    }
    told = ", ".join(f"{name} {ratio:.3f}" for name, ratio in line["over_floor"].items())
    named = " ".join(str(value) for value in what.values() if isinstance(value, str))
    print(f"{named}: floor {line['floor_s']:.3f} s; {told}; kept {line['kept_MB_beyond_floor']}")
    return line


def compare(shape: str, dtype: str, targets: str, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    ids = token_ids(shape, options.device)
    names = [name for name in options.jobs if not (options.dropout and name == "unsloth")]  # it has no dropout
    jobs = {name: job_of(name, shape, DTYPES[dtype], TARGETS[targets], ids, options.dropout) for name in names}
    what = {"shape": shape, "dtype": dtype, "targets": targets, "dropout": options.dropout}
    return measured(what, jobs, options.runs, clock_for(options.threads, options.device))


def main() -> None:
    """Measure what is asked for, print it, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=ON, default="cpu")
    parser.add_argument("--runs", type=int, default=9, help="rounds (the claim wants at least 9)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shape", nargs="+", choices=SHAPES)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dropout", type=float, default=0.0, help="the adapters' lora_dropout")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; leave it out to measure on the CPU")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    report: dict[str, Any] = {"conditions": conditions(options.threads, options.device), "lines": []}
    for shape in options.shape or ON[options.device]:
        for targets in options.targets:
            for dtype in options.dtype:
                report["lines"].append(compare(shape, dtype, targets, options))
                keep(report, options.out)


if __name__ == "__main__":
    main()
