"""Claim: a whole training by `lowrank.train` beats PEFT + transformers' Trainer in tokens a second, in no more memory.

    python benchmarks/whole_training.py --out results.json [--tasks e2e packed] [--dtype f32 bf16] [--rounds 3]

e2e     stories260K (../shared/models) on E2E (../shared/data), prompts with completions, 32 rows a step
packed  a random Llama of 6 layers, 768 wide, on the same rows packed to 1,024 tokens, 2 packs a step
Adapters on all linear layers; AdamW, the same rate, clipping, batches, order and positions for both. A job is a process
of its own, on all cores that it may use (on one of them by the process's own clock, which other programs disturb
little); the jobs of a round share a seed and go one after the other, in another order each round. A round is written
when it is measured, and a second start goes on from there.

tokens_per_second  of the steps alone, from the first to the last; tokens are those read, without padding
seconds            from the call to the saved adapter: loading, tokens (kept for both), steps, saving
loss               the mean over the last quarter of the steps
memory_mb          the most that was resident of the process, Python and torch in it
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common import ROOT, clock_for, conditions, keep

SHARED = ROOT.parent / "shared"
STORIES, ROWS = SHARED / "models/stories260K", SHARED / "data/e2e/trainset.csv"
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
TASKS: dict[str, dict[str, Any]] = {
    "e2e": {"steps": 40, "batch_size": 32, "rank": 8, "lr": 3e-3},
    "packed": {"steps": 6, "batch_size": 2, "rank": 16, "lr": 1e-3, "pack": True, "max_length": 1024},
}
JOBS = ("lowrank", "peft")
LOG_EVERY = 2
THREADS = len(os.sched_getaffinity(0))
CLOCK = clock_for(THREADS)


def settings(task: str, dtype: str, seed: int, out: Path) -> Any:
    """Of the training, for `lowrank.train`."""
    from lowrank.train import TrainSettings

    model = STORIES if task == "e2e" else out.parent / "random"
    columns = {"prompt_column": "mr", "completion_column": "ref"}
    rate = {"schedule": "constant", "warmup": 0.0, "log_every": LOG_EVERY, "init": "kaiming", "targets": "all-linear"}
    told = {"model": str(model), "data": str(ROWS), "out": str(out), "dtype": DTYPES[dtype], "seed": seed}
    return TrainSettings.model_validate({**told, **columns, **rate, "device": "cpu", **TASKS[task]})


def random_model(folder: Path) -> None:
    """The 6×768 Llama of the other benchmarks, with the tokenizer of stories260K."""
    import torch
    import transformers
    from common import SHAPES, Shape, base_model

    SHAPES["6x768"] = Shape(6, 768, 2048, 12, 12, length=TASKS["packed"]["max_length"])
    base_model("6x768", torch.float32).save_pretrained(folder)
    longest = TASKS["packed"]["max_length"]
    transformers.AutoTokenizer.from_pretrained(STORIES, model_max_length=longest).save_pretrained(folder)


def batches(task: str, seed: int, out: Path) -> list[dict[str, Any]]:
    """The rows in the order of the steps, as `lowrank.train` takes them: tokens, labels, and where rows start."""
    from lowrank.data.batches import batches_from
    from lowrank.train.preparing import prepare

    asked = settings(task, "f32", seed, out)
    rows = prepare(asked).data.examples
    order = batches_from(0, len(rows), asked.batch_size, seed)
    numbers = [number for _, step in zip(range(asked.steps), order, strict=False) for number in step]
    return [
        {"ids": list(e.ids), "labels": list(e.labels), "starts": list(e.starts)} for e in map(rows.__getitem__, numbers)
    ]


def by_lowrank(task: str, dtype: str, seed: int, folder: Path) -> dict[str, Any]:
    """One training through `lowrank.train.run`."""
    from lowrank import train
    from lowrank.train.reporting import Progress, Reporter

    class Watch(Reporter):
        losses: list[float]
        began = ended = 0.0

        def started(self, *_: Any) -> None:
            self.losses, self.began = [], CLOCK()

        def stepped(self, *_: Any) -> None:
            self.ended = CLOCK()

        def progressed(self, progress: Progress) -> None:
            self.losses.append(progress.loss)

    watch = Watch()
    asked = settings(task, dtype, seed, folder / f"lowrank-{dtype}-{seed}")
    began = CLOCK()
    train.run(asked, watch)
    return figures(CLOCK() - began, watch.ended - watch.began, watch.losses)


def by_peft(task: str, dtype: str, seed: int, folder: Path) -> dict[str, Any]:
    """The same training through PEFT and Trainer, on the rows that the other one has."""
    import peft
    import torch
    import transformers

    rows = json.loads((folder / f"rows-{seed}.json").read_text())
    wanted = TASKS[task]
    clock = {}

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock["began"] = CLOCK()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock["ended"] = CLOCK()

    began = CLOCK()
    transformers.set_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        STORIES if task == "e2e" else folder / "random", dtype=getattr(torch, DTYPES[dtype])
    )
    config = peft.LoraConfig(r=wanted["rank"], lora_alpha=2 * wanted["rank"], target_modules="all-linear")
    arguments = transformers.TrainingArguments(
        str(folder / f"peft-{dtype}-{seed}"),
        max_steps=wanted["steps"],
        per_device_train_batch_size=wanted["batch_size"],
        learning_rate=wanted["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=LOG_EVERY,
        report_to=[],
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = transformers.Trainer(
        peft.get_peft_model(model, config), arguments, data_collator=collate, train_dataset=rows, callbacks=[Watch()]
    )
    trainer.train()
    trainer.save_model(arguments.output_dir)
    seconds = CLOCK() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return figures(seconds, clock["ended"] - clock["began"], losses)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows padded to the longest; packed rows are told apart by positions that restart, as transformers does."""
    import torch

    length = max(len(row["ids"]) for row in rows)

    def padded(name: str, fill: int) -> Any:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    batch = {"input_ids": padded("ids", 0), "labels": padded("labels", -100)}
    if any(len(row["starts"]) > 1 for row in rows):
        edges = [[*row["starts"], len(row["ids"]), length] for row in rows]
        batch["position_ids"] = torch.tensor(
            [[at for start, end in pairwise(e) for at in range(end - start)] for e in edges]
        )
    else:
        sizes = torch.tensor([len(row["ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(length) < sizes[:, None]).long()
    return batch


def figures(seconds: float, stepping: float, losses: list[float]) -> dict[str, Any]:
    """What one process says of itself."""
    high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    last = losses[-max(1, len(losses) // 4) :]
    memory = round(int(high.split()[1]) / 1024)
    return {"seconds": seconds, "stepping": stepping, "loss": statistics.mean(last), "memory_mb": memory}


def child(job: str, task: str, dtype: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run one job in a process of its own."""
    command = [sys.executable, __file__, "--job", job, task, dtype, str(seed), str(folder)]
    environment = {**os.environ, "LOWRANK_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_job(job: str, task: str, dtype: str, seed: str, place: str) -> dict[str, Any]:
    """What `child` asked for."""
    import transformers

    transformers.logging.set_verbosity_error()
    folder = Path(place)
    if job == "rows":
        if task == "packed" and not (folder / "random").exists():
            random_model(folder / "random")
        rows = batches(task, int(seed), folder / "rows")
        (folder / f"rows-{seed}.json").write_text(json.dumps(rows))
        return {"tokens": sum(len(row["ids"]) for row in rows)}
    return (by_lowrank if job == "lowrank" else by_peft)(task, dtype, int(seed), folder)


def one_round(task: str, dtype: str, seed: int) -> dict[str, Any]:
    """{job: its figures}, all jobs on the rows of one seed."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        tokens = child("rows", task, dtype, seed, Path(place))["tokens"]
        for job in JOBS if seed % 2 else JOBS[::-1]:
            one = child(job, task, dtype, seed, Path(place))
            found[job] = {name: round(value, 4) for name, value in one.items()}
            found[job]["tokens_per_second"] = round(tokens / one["stepping"], 1)
    return found


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds of lowrank's figures over PEFT's, and how far the losses lie apart."""
    names = ("tokens_per_second", "seconds", "memory_mb")
    ours, theirs = JOBS
    over = {name: round(statistics.median(r[ours][name] / r[theirs][name] for r in rounds), 3) for name in names}
    return over | {"losses_apart": round(max(abs(r[ours]["loss"] / r[theirs]["loss"] - 1) for r in rounds), 4)}


def main() -> None:
    """Measure the cells that are not yet in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(*options.job)))
        return
    if not (STORIES.is_dir() and ROWS.is_file()):
        raise SystemExit(f"needs {STORIES} and {ROWS}")
    cells = json.loads(options.out.read_text())["cells"] if options.out and options.out.exists() else {}
    here = conditions(THREADS)
    for task in options.tasks:
        for dtype in options.dtype:
            cell = cells.setdefault(f"{task}, {dtype}", {"over_peft": {}, "rounds": []})
            for seed in range(len(cell["rounds"]), options.rounds):
                cell["rounds"].append(one_round(task, dtype, seed) | {"commit": here["commit"]})
                cell["over_peft"] = summary(cell["rounds"])
                keep({"conditions": here, "tasks": TASKS, "cells": cells}, options.out)
            print(f"{task}, {dtype}: {cell['over_peft']}", flush=True)


if __name__ == "__main__":
    main()
