"""Claim: a merged adapter costs nothing in inference. Beside it, what an unmerged one costs, and PEFT's.

The Llama-shaped model in inference, without gradients, on a batch of 1, 16 or 256 tokens; the jobs take turns.

floor        the plain model
lowrank      with a rank-16 adapter on all linear layers by lowrank.inject
merged       the same inside `lowrank.merged(model)`
peft         under PEFT
accelerated  under PEFT after lowrank.peft.accelerate

    python benchmarks/decoding.py [--runs 15] [--threads 1] [--out benchmarks/results/decoding.json]
"""

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from common import DTYPES, TARGETS, VOCABULARY, Job, base_model, clock_for, conditions, keep, ratios, take_turns
from torch import Tensor, nn
from training_step import adapted

import lowrank

REPEATS = 5  # forward passes in one turn


def inference_job(model: nn.Module, ids: Tensor) -> Job:
    """A few forward passes without gradients."""

    def step() -> Tensor:
        with torch.no_grad():
            for _ in range(REPEATS):
                logits: Tensor = model(input_ids=ids).logits
        return logits

    return step


def compare(tokens: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(2))
    models = {
        name: adapted(name, base_model("6x768", DTYPES[dtype]), TARGETS["all"])
        for name in ("lowrank", "peft", "accelerated")
    }
    models["floor"] = base_model("6x768", DTYPES[dtype])
    models["merged"] = lowrank.merge_and_unload(adapted("lowrank", base_model("6x768", DTYPES[dtype]), TARGETS["all"]))
    jobs = {name: inference_job(model.eval(), ids) for name, model in models.items()}
    seconds = take_turns(jobs, options.runs, clock_for(options.threads))
    line = {"tokens": tokens, "dtype": dtype, "over_floor": ratios(seconds, "floor")}
    print(f"{tokens} tokens {dtype}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in line["over_floor"].items()))
    return line


def main() -> None:
    """Measure, print, and keep where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    report: dict[str, Any] = {"conditions": conditions(options.threads), "lines": []}
    for dtype in DTYPES:
        report["lines"] += [compare(tokens, dtype, options) for tokens in (1, 16, 256)]
    keep(report, options.out)


if __name__ == "__main__":
    main()
