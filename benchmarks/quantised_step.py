"""Claim: a LoRA step over a quantised base takes at most 1.10× the frozen quantised model's (6×768, all-linear).

The model, the tokens and the turns are those of training_step.py; every linear layer but the head is quantised.

floor        bitsandbytes' own layers, all frozen: forward and the gradient with respect to the input embeddings
lowrank      rank 16 by lowrank.inject
peft         rank 16 under PEFT, as `get_peft_model` makes it
accelerated  the same after lowrank.peft.accelerate
plain        the floor of the model before it was quantised, for comparison

    python benchmarks/quantised_step.py [--runs 9] [--threads 2] [--scheme nf4 int8] [--dtype f32] [--shape 6x768]
                                  [--out benchmarks/results/quantised_step.json]

Memory figures are the bytes that autograd keeps for backward beyond the floor's.
"""

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from common import (
    DTYPES,
    SHAPES,
    TARGETS,
    Job,
    base_model,
    clock_for,
    conditions,
    floor_job,
    keep,
    token_ids,
    training_job,
)
from training_step import adapted, measured

import lowrank

JOBS = ("floor", "lowrank", "peft", "accelerated", "plain")
SCHEMES = ("nf4", "nf4-double", "int8")


def job_of(name: str, scheme: str, shape: str, dtype: torch.dtype, ids: torch.Tensor) -> Job:
    """A job by its name."""
    model: Any = base_model(shape, dtype, ids.device.type)
    if name != "plain":
        kind, _, double = scheme.partition("-")
        lowrank.quantise(model, kind, double=bool(double))
        setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    if name in ("floor", "plain"):
        return floor_job(model, ids)
    return training_job(adapted(name, model, TARGETS["all"]), ids)


def compare(shape: str, dtype: str, scheme: str, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    ids = token_ids(shape, options.device)
    jobs = {name: job_of(name, scheme, shape, DTYPES[dtype], ids) for name in options.jobs}
    what = {"shape": shape, "dtype": dtype, "scheme": scheme}
    return measured(what, jobs, options.runs, clock_for(options.threads, options.device))


def main() -> None:
    """Measure what is asked for, print it, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=9, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["f32"])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["6x768"])
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=["nf4", "int8"])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    report: dict[str, Any] = {"conditions": conditions(options.threads, options.device), "lines": []}
    for shape in options.shape:
        for dtype in options.dtype:
            for scheme in options.scheme:
                report["lines"].append(compare(shape, dtype, scheme, options))
                keep(report, options.out)


if __name__ == "__main__":
    main()
