"""Claim: a thousand adapters go onto one model and off it in time that is linear in their number.

Injects N adapters of rank 4 on q_proj and v_proj of a small Llama of two layers, one after another, switches to the
first of them, and gives the plain model back; N doubles up to the largest. PEFT does the same up to a quarter of the
largest N. Each N is a process of its own, on one thread; figures are its CPU seconds.

    python benchmarks/many_adapters.py [--most 1000] [--out benchmarks/results/many_adapters.json]

inject_s   all N injections (PEFT: get_peft_model and add_adapter); last_ms is the median of the last tenth, one each
switch_s   `set_active` of one of the N (PEFT: set_adapter)
unload_s   all N off at once
delete_s   of another model: one after another by `delete_adapter`, a quarter of the largest N at most
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from common import conditions, keep
from torch import nn

TARGETS, RANK = ["q_proj", "v_proj"], 4
Seconds = dict[str, float]


def small_model() -> nn.Module:
    """Two layers, 64 wide: what is measured is the handling of adapters, not products."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))


def spent(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def with_lowrank(names: list[str], delete: bool) -> Seconds:
    """The figures of one N."""
    import lowrank

    config = lowrank.LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS)
    model = small_model()
    found = _injected([spent(lambda name=name: lowrank.inject(model, config, name)) for name in names])
    found["switch_s"] = spent(lambda: lowrank.set_active(model, names[:1]))
    found["unload_s"] = spent(lambda: lowrank.unload(model))
    if delete:
        for name in names:
            lowrank.inject(model, config, name)
        found["delete_s"] = spent(lambda: [lowrank.delete_adapter(model, name) for name in names])
    return found


def with_peft(names: list[str], delete: bool) -> Seconds:
    """The same by PEFT."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS)
    made: list[Any] = []

    def wrap() -> None:
        made.append(peft.get_peft_model(small_model(), config, adapter_name=names[0]))

    first = spent(wrap)
    model = made[0]
    found = _injected([first, *(spent(lambda name=name: model.add_adapter(name, config)) for name in names[1:])])
    found["switch_s"] = spent(lambda: model.set_adapter(names[0]))
    if delete:
        other = peft.get_peft_model(small_model(), config, adapter_name=names[0])
        for name in names[1:]:
            other.add_adapter(name, config)
        found["delete_s"] = spent(lambda: [other.delete_adapter(name) for name in names[:-1]])
    found["unload_s"] = spent(model.unload)
    return found


def _injected(each: list[float]) -> Seconds:
    last = each[-max(len(each) // 10, 1) :]
    return {"inject_s": sum(each), "last_ms": 1000 * statistics.median(last)}


PROGRAMS = {"lowrank": with_lowrank, "peft": with_peft}


def measure(program: str, count: int, delete: bool) -> Seconds:
    """One N in a process of its own."""
    command = [sys.executable, __file__, "--one", program, str(count), str(int(delete))]
    found: Seconds = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        program, count, delete = options.one
        print(json.dumps(PROGRAMS[program]([f"adapter-{n}" for n in range(int(count))], bool(int(delete)))))
        return
    counts = [options.most // 2**power for power in (3, 2, 1, 0)]
    few = options.most // 4
    report = {"claim": str(__doc__).partition("\n")[0], "conditions": conditions(1)}
    for count in counts:
        for program in PROGRAMS if count <= few else ["lowrank"]:
            report.setdefault(program, {})[count] = measure(program, count, count <= few)
    print(json.dumps(report, indent=1))
    keep(report, options.out)


if __name__ == "__main__":
    main()
