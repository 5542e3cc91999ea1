"""Claim: a LoRA step over a mixture's experts takes at most 1.3× the frozen model's (Mixtral-shaped, r = 8).

Four layers of 8 experts (512 → 1,024 → 512, two for each token), 1,024 tokens; experts and attention are adapted.

floor        everything frozen: forward and the gradient with respect to the input embeddings
lowrank      rank 8 by lowrank.inject
peft         rank 8 under PEFT, target_modules and target_parameters

    python benchmarks/experts_step.py [--runs 9] [--threads 2] [--dtype f32 bf16] [--way grouped_mm eager]
                                  [--out benchmarks/results/experts_step.json]

Memory: bytes that autograd keeps for backward beyond the floor's, and the most that a process of its own held
(VmHWM) in three steps beyond the floor's.
"""

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from common import DTYPES, VOCABULARY, Job, clock_for, conditions, floor_job, keep, token_ids, training_job
from torch import nn
from training_step import measured

import lowrank

JOBS = ("floor", "lowrank", "peft")
WAYS = ("grouped_mm", "eager", "batched_mm")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral(dtype: torch.dtype, way: str) -> Any:
    """The frozen mixture, the same numbers each time."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=VOCABULARY,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(dtype).requires_grad_(False)
    model.set_experts_implementation(way)
    return model


def adapted(name: str, model: nn.Module) -> nn.Module:
    """The mixture with an adapter of rank 8 by "lowrank" or "peft"."""
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION, "target_parameters": STACKS}
    if name == "lowrank":
        lowrank.inject(model, lowrank.LoraConfig(**settings))
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    for key, tensor in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(tensor, std=0.01)
    return model


def job_of(name: str, dtype: str, way: str) -> Job:
    """A job by its name."""
    model = mixtral(DTYPES[dtype], way)
    return floor_job(model, token_ids()) if name == "floor" else training_job(adapted(name, model), token_ids())


def peaks(dtype: str, way: str, threads: int) -> dict[str, float]:
    """MB that each job's process held at most, beyond the floor's."""
    most = {}
    for name in JOBS:
        call = [sys.executable, __file__, "--peak", name, "--dtype", dtype, "--way", way, "--threads", str(threads)]
        most[name] = float(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    return {name: round(most[name] - most["floor"], 1) for name in JOBS if name != "floor"}


def main() -> None:
    """Measure what is asked for, print it, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["f32"])
    parser.add_argument("--way", nargs="+", choices=WAYS, default=["grouped_mm"])
    parser.add_argument("--peak", choices=JOBS, help="print what one job's process holds at most, in MB, and no more")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if options.peak:
        step = job_of(options.peak, options.dtype[0], options.way[0])
        for _ in range(3):
            step()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) / 1000)
        return
    report: dict[str, Any] = {"conditions": conditions(options.threads), "lines": []}
    for dtype in options.dtype:
        for way in options.way:
            jobs = {name: job_of(name, dtype, way) for name in JOBS}
            line = measured({"dtype": dtype, "way": way}, jobs, options.runs, clock_for(options.threads))
            line["peak_MB_beyond_floor"] = peaks(dtype, way, options.threads)
            print("peak", line["peak_MB_beyond_floor"])
            report["lines"].append(line)
            keep(report, options.out)


if __name__ == "__main__":
    main()
