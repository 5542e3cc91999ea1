"""Claim: training a 1.1 B model in NF4, micro-batch 1 × 512, checkpointed activations, peaks no higher than PEFT's.

A TinyLlama-shaped model of random weights is put into NF4 a block at a time, gets rank 16 on all linear layers, and
takes AdamW steps; every job runs in a process of its own, whose largest resident memory is read.

    python benchmarks/quantised_memory.py [--layers 22] [--steps 2] [--dtype bf16] [--jobs lowrank peft accelerated]
                                    [--out benchmarks/results/quantised_memory.json]

built     before the first step: the model in NF4, the adapter, the libraries
peak      the largest there ever was; the difference is what training takes
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, TARGETS, conditions, keep
from merge_disk import TINY, config_of
from torch import nn
from training_step import adapted
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank
from lowrank.train.models import checkpoint_activations

JOBS = ("lowrank", "peft", "accelerated")
LENGTH = 512


def resident() -> int:
    """The largest resident memory this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_in_nf4(layers: int, dtype: torch.dtype) -> nn.Module:
    """The model, no more than a block of it ever dense."""
    said = config_of(TINY | {"layers": layers})
    config = LlamaConfig(**{key: value for key, value in said.items() if key not in ("architectures", "model_type")})
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    for block in [*model.model.layers, model.model.embed_tokens, model.model.norm, model.lm_head]:
        block.to_empty(device="cpu")
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
        if block in list(model.model.layers):
            lowrank.quantise(block, "nf4")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.is_loaded_in_4bit = True
    return model


def job(name: str, layers: int, steps: int, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """One way to train, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: Any = model_in_nf4(layers, dtype)
    checkpoint_activations(model)
    model.enable_input_require_grads()
    model = adapted(name, model, TARGETS["all"]).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, TINY["vocab"], (1, LENGTH))
    built = resident()
    for _ in range(steps):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    trained_numbers = sum(parameter.numel() for parameter in trained)
    return {"job": name, "built_gb": built / 1e9, "peak_gb": resident() / 1e9, "trained": trained_numbers}


def main() -> None:
    """Measure each job in a process of its own, print it, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=TINY["layers"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--one", action="store_true", help="run the one job here, and print it as JSON")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.one:
        print(json.dumps(job(options.jobs[0], options.layers, options.steps, DTYPES[options.dtype], options.threads)))
        return
    report: dict[str, Any] = {"conditions": conditions(options.threads), "shape": TINY | {"layers": options.layers}}
    report |= {"tokens": LENGTH, "dtype": options.dtype, "jobs": []}
    shared = [f"--{name}={getattr(options, name)}" for name in ("layers", "steps", "threads", "dtype")]
    for name in options.jobs:
        done = subprocess.run(
            [sys.executable, __file__, "--one", "--jobs", name, *shared], check=True, capture_output=True, text=True
        )
        report["jobs"].append(json.loads(done.stdout.splitlines()[-1]))
        print(report["jobs"][-1], flush=True)
        keep(report, options.out)


if __name__ == "__main__":
    main()
