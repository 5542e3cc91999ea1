"""Claim: a checkpoint costs under 0.3 s beyond the disk's own time, and going on starts as fast as beginning.

    python benchmarks/checkpoint.py [--folder /a/disk] [--rounds 9] [--rows 100000] [--out results.json]

write     the run's value of an all-linear adapter of rank 16 of a 1.1 B model (factors, Adam's averages, ...), taken
          from a loop and written: what training waits for
cp        the same files copied and synced: the floor
step      the optimiser's step after a checkpoint, over one that no checkpoint came before
begin     a training of many rows, in a process of its own, until its first step is taken; rows and tokens are kept
resume    the same from a checkpoint in the fourth epoch
Jobs take turns. Prints one JSON object with the figures, the commit and the hardware.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from common import conditions, keep
from merge_disk import TINY, config_of
from torch import nn

from lowrank import LoraConfig, inject
from lowrank.core.factors import LoraFactors
from lowrank.data.tokens import Example
from lowrank.train.loop import Loop
from lowrank.train.reporting import Reporter
from lowrank.train.settings import LoopSettings
from lowrank.train.state.capture import capture
from lowrank.train.state.forward import ForwardState
from lowrank.train.state.store import checkpoint, steps_kept
from lowrank.train.state.value import About, LogFacts
from train_models import completion_rows, save_llama, write_jsonl

EPOCHS = 3  # before the step that is gone on from
UNTIL_FIRST_STEP = """
import sys, time
began = time.monotonic()
import torch
from lowrank import train
from lowrank.train.reporting import Reporter
from lowrank.train.settings import TrainSettings
torch.set_num_threads(1)
how, model, data, out, last = sys.argv[1:]
class First(Reporter):
    def started(self, summary, steps):
        self.at = None
    def stepped(self, step):
        self.at = self.at or step
        if step == self.at + int(last):
            print(time.monotonic() - began, step, flush=True)
            import os
            os._exit(0)
asked = {"model": model, "data": data, "out": out, "steps": 10**6, "save_every": 2, "device": "cpu"}
train.resume(out, First()) if how == "resume" else train.run(TrainSettings.model_validate(asked), First())
"""


def factors_of_one_billion() -> nn.Module:
    """The factors of an adapter on a model that is on the meta device, drawn at random."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_of(TINY)))
    inject(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    found = [module.to_empty(device="cpu") for module in model.modules() if isinstance(module, LoraFactors)]
    for parameter in (held := nn.ModuleList(found)).parameters():
        nn.init.normal_(parameter.requires_grad_(True))
    return held


def step(loop: Loop) -> float:
    """Seconds of an optimiser's step over gradients that are there."""
    for parameter in loop.state.optimiser.parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    began = time.perf_counter()
    loop.state.optimiser.step(1.0)
    return time.perf_counter() - began


def copied(source: Path, target: Path) -> float:
    """Seconds of a plain copy of all files in a folder, each synced, and the folders."""
    began = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as one, (target / path.name).open("wb") as other:
            shutil.copyfileobj(one, other, 2**24)
            other.flush()
            os.fsync(other.fileno())
    for folder in (target, target.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def writing(folder: Path, rounds: int) -> dict[str, Any]:
    """A checkpoint beside a copy of its files."""
    loop = Loop(factors_of_one_billion(), [Example([1], [1])], [], None, LoopSettings(), Reporter())  # type: ignore[arg-type]
    forward, about = ForwardState(loop.model), About(steps=1, settings={}, made_of={}, machine={})
    log = LogFacts(length=0, seconds=0.0)
    found: dict[str, list[float]] = {"write": [], "cp": [], "step": [], "step after": []}
    for number in range(rounds + 1):
        step(loop)
        found["step"].append(step(loop))
        target = folder / f"write-{number}"
        began = time.perf_counter()
        capture(loop, forward, about, log).write(target)
        found["write"].append(time.perf_counter() - began)
        found["step after"].append(step(loop))
        found["cp"].append(copied(target, folder / f"cp-{number}"))
        size = sum(path.stat().st_size for path in target.iterdir())
        shutil.rmtree(target)
        shutil.rmtree(folder / f"cp-{number}")
    times = {name: statistics.median(values[1:]) for name, values in found.items()}
    return {
        "megabytes": round(size / 1e6, 1),
        "write_s": round(times["write"], 3),
        "cp_s": round(times["cp"], 3),
        "beyond_cp_s": round(times["write"] - times["cp"], 3),
        "step_after_over_step": round(times["step after"] / times["step"], 3),
        "all": {name: [round(value, 4) for value in values] for name, values in found.items()},
    }


def first_step(how: str, folder: Path, out: Path, more: int = 0) -> float:
    """Seconds from the start of a process to its first step; it takes `more` steps, and is gone."""
    line = [sys.executable, "-c", UNTIL_FIRST_STEP, how, str(folder / "llama"), str(folder / "rows.jsonl"), str(out)]
    environment = os.environ | {"LOWRANK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*line, str(more)], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[0])


def starting(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """A fresh start beside going on, in turns."""
    save_llama(folder / "llama")
    write_jsonl(folder / "rows.jsonl", completion_rows(rows))
    cold = first_step("begin", folder, folder / "cold")
    first_step("begin", folder, folder / "run", more=3)
    place = checkpoint(folder / "run", steps_kept(folder / "run")[-1])
    facts = json.loads((place / "state.json").read_text())
    per_epoch = -(-rows // 8)
    facts |= {"step": EPOCHS * per_epoch + per_epoch // 2, "place": [EPOCHS, per_epoch // 2]}
    (place / "state.json").write_text(json.dumps(facts))
    found: dict[str, list[float]] = {"begin": [], "resume": []}
    for number in range(rounds):
        found["begin"].append(first_step("begin", folder, folder / f"begin-{number}"))
        found["resume"].append(first_step("resume", folder, folder / "run"))
    times = {name: statistics.median(values) for name, values in found.items()}
    return {
        "rows": rows,
        "from_step": facts["step"],
        "begin_first_time_s": round(cold, 2),
        "begin_s": round(times["begin"], 2),
        "resume_s": round(times["resume"], 2),
        "resume_over_begin": round(times["resume"] / times["begin"], 3),
        "all": {name: [round(value, 2) for value in values] for name, values in found.items()},
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to write; the disk is part of what is measured")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        result = {
            "checkpoint": writing(Path(name), asked.rounds),
            "start": starting(Path(name), asked.rows, min(5, asked.rounds)),
            "conditions": conditions(torch.get_num_threads()),
        }
    print(json.dumps(result, indent=1))
    keep(result, asked.out)


if __name__ == "__main__":
    main()
