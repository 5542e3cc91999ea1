"""The claim: at no width, length, rank, dtype or dropout is a training step by lowrank slower than by PEFT.

A one-block Llama each, on one thread by the process's own clock, the jobs by turns. Every cell is written when it is
measured, and a second start goes on from there: `python benchmarks/never_slower.py --out results.json`. Held to another
instruction set by ATEN_CPU_CAPABILITY=default or avx2. Where half precision has no fast product its cells take minutes.
"""

import argparse
import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from common import (
    ALL_LINEAR,
    DTYPES,
    SHAPES,
    Shape,
    base_model,
    clock_for,
    conditions,
    keep,
    ratios,
    take_turns,
    token_ids,
    training_job,
)
from torch import nn

import lowrank


def adapted(how: str, model: nn.Module, rank: int, dropout: float) -> nn.Module:
    """The model with an adapter on all linear layers, by "lowrank", "peft", or PEFT "accelerated"."""
    settings: dict[str, Any] = {
        "r": rank, "lora_alpha": 2 * rank, "target_modules": ALL_LINEAR, "lora_dropout": dropout
    }  # fmt: skip
    if how == "lowrank":
        lowrank.inject(model, lowrank.LoraConfig(**settings))
        return model
    import peft

    wrapped: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**settings))
    if how == "accelerated":
        lowrank.peft.accelerate(wrapped)
    return wrapped


def measure(width: int, tokens: int, rank: int, dtype: str, dropout: float, runs: int) -> dict[str, float]:
    """The time of a step by lowrank and by an accelerated PEFT model over PEFT's."""
    name = f"1x{width}"
    SHAPES[name] = Shape(1, width, 8 * width // 3, width // 64, width // 64, 1, tokens)
    ids = token_ids(name)
    jobs = {
        how: training_job(adapted(how, base_model(name, DTYPES[dtype]), rank, dropout).train(), ids)
        for how in ("lowrank", "peft", "accelerated")
    }
    return ratios(take_turns(jobs, runs, clock_for(1)), "peft")


def main() -> None:
    """Measure the cells that are not yet in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", nargs="+", type=int, default=[192, 384, 768, 1536])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 1024, 4096])
    parser.add_argument("--rank", nargs="+", type=int, default=[4, 16, 128])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["f32"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    cells = json.loads(options.out.read_text())["cells"] if options.out.exists() else {}
    here = conditions(1) | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "asked": os.environ.get("ATEN_CPU_CAPABILITY"),
    }
    report: dict[str, Any] = {"conditions": here, "cells": cells}
    for cell in itertools.product(options.width, options.tokens, options.rank, options.dtype, options.dropout):
        key = "{} wide, {} tokens, rank {}, {}, dropout {}".format(*cell)
        if key not in cells:
            cells[key] = measure(*cell, options.runs) | {"commit": here["commit"]}
            print(f"{key}: {cells[key]}", flush=True)
            keep(report, options.out)


if __name__ == "__main__":
    main()
