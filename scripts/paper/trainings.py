"""The small trainings on SST-2 that Tables 5 and 6 and the comparison with full fine-tuning are read from."""

import shutil
import time
from collections.abc import Iterator

from common import RUNS, SST2, Result, kept, minilm

from lowrank.train.settings import TrainSettings
from lowrank.train.trainer import run

STEPS, BATCH, ROWS = 60, 16, 400
SEEDS = (0, 1, 2)
QV = "query,value"
ADAPTER = {"lr": 2e-3}

JOBS: dict[str, Result] = {
    "qv-r8": {"targets": QV, "rank": 8, **ADAPTER},
    "qv-r1": {"targets": QV, "rank": 1, **ADAPTER},
    "full": {"full": True, "lr": 1e-4},
    "frozen": {"targets": QV, "rank": 1, "alpha": 0.0, **ADAPTER},  # scale 0: ΔW stays 0, only the head learns
    "qv-r4": {"targets": QV, "rank": 4, **ADAPTER},
    "q-r8": {"targets": "query", "rank": 8, **ADAPTER},
    "v-r8": {"targets": "value", "rank": 8, **ADAPTER},
    "qv-r64": {"targets": QV, "rank": 64, **ADAPTER},
    "k-r8": {"targets": "key", "rank": 8, **ADAPTER},
    "qv-r2": {"targets": QV, "rank": 2, **ADAPTER},
}


def train_all(seeds: tuple[int, ...], again: bool = False, jobs: tuple[str, ...] = tuple(JOBS)) -> Iterator[Result]:
    """Every job with every seed, a seed at a time, so that what is there when one stops is balanced."""
    for seed in seeds:
        for job in jobs:
            command = f"python scripts/paper --train {job} --seeds {seed}"
            yield kept(f"sst2-{job}-seed{seed}", lambda job=job, seed=seed: train(job, seed), command, again)


def train(job: str, seed: int) -> Result:
    """One run. The kept adapter lies in runs/paper."""
    out = RUNS / f"sst2-{job}-seed{seed}"
    shutil.rmtree(out, ignore_errors=True)
    settings = TrainSettings(
        model=str(minilm()),
        data=str(SST2 / "train.tsv"),
        out=str(out),
        text_column="sentence",
        max_length=64,
        steps=STEPS,
        batch_size=BATCH,
        group_by_length=True,
        eval_data=str(SST2 / "dev.tsv"),
        eval_rows=ROWS,
        eval_every=STEPS,
        seed=seed,
        **JOBS[job],
    )
    started = time.perf_counter()
    result = run(settings)
    seconds = time.perf_counter() - started
    if result.after is None or result.before is None:
        raise RuntimeError(f"{out}: nothing was evaluated")
    return {
        "task": "SST-2",
        "job": job,
        "seed": seed,
        "settings": {**JOBS[job], "steps": STEPS, "batch_size": BATCH, "eval_rows": ROWS},
        "before": result.before.accuracy,
        "accuracy": result.after.accuracy,
        "loss": result.after.loss,
        "seconds": round(seconds, 1),
    }
