"""The trainings that Tables 2, 3, 5 and 6 are read from: a rate is chosen for each, then every seed is trained."""

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bleu import bleu
from common import RUNS, Result, kept
from tasks import Job, Task, tasks

from lowrank.train.evaluation import Scores
from lowrank.train.settings import TrainSettings
from lowrank.train.trainer import run

SEEDS = (0, 1, 2)
TUNING_SEED = 100  # another order, another A and another head than any that is scored


def train_all(task: str, seeds: tuple[int, ...], again: bool = False, jobs: tuple[str, ...] = ()) -> Iterator[Result]:
    """Every job with every seed, a seed at a time, so that what is there when one stops is balanced."""
    for seed in seeds:
        for job in jobs or tasks()[task].jobs:
            tuned = kept(f"{task}-{job}-rates", lambda job=job: tune(task, job), command(task, job), again and not seed)
            rate = tuned["best"]
            name = f"{task}-{job}-seed{seed}"
            yield kept(
                name, lambda job=job, rate=rate, seed=seed: train(task, job, rate, seed), command(task, job), again
            )


def command(task: str, job: str) -> str:
    """What measures this again."""
    return f"python scripts/paper --long --task {task} --jobs {job} --again"


def tune(task: str, job: str) -> Result:
    """The rate with the best score on rows that are held out of the training data; no row of the score is looked at."""
    how = tasks()[task]
    held_out = {"eval_split": how.tuning_share, "eval_rows": 500}
    found = {}
    for rate in how.jobs[job].rates:
        scores = run_task(how, how.jobs[job], rate, TUNING_SEED, RUNS / "tuning" / f"{task}-{job}", held_out)
        # the loss decides where text is written: BLEU of so few rows would be noise
        found[rate] = (
            -scores.loss if how.metric == "bleu" else (scores.matthews if how.metric == "matthews" else scores.accuracy)
        )
    best = max(found, key=lambda rate: found[rate] or 0.0)
    return {"task": task, "job": job, "rates": {str(rate): score for rate, score in found.items()}, "best": best}


def train(task: str, job: str, rate: float, seed: int) -> Result:
    """One run and its score, with the score's sampling error. The kept adapter lies in runs/paper."""
    how = tasks()[task]
    out = RUNS / f"{task}-{job}-seed{seed}"
    began = time.perf_counter()
    scores = run_task(
        how, how.jobs[job], rate, seed, out, how.scored or {"eval_split": how.tuning_share, "eval_rows": 500}
    )
    seconds = time.perf_counter() - began
    score, error, rows = _score(how, out, scores, bool(how.jobs[job].changes.get("full")))
    return {
        "task": task,
        "job": job,
        "seed": seed,
        "metric": how.metric,
        "score": score,
        "error": error,
        "rows": rows,
        "loss": scores.loss,
        "rate": rate,
        "settings": {**how.jobs[job].changes, "steps": how.settings["steps"], "batch_size": how.settings["batch_size"]},
        "seconds": round(seconds, 1),
    }


def run_task(how: Task, job: Job, rate: float, seed: int, out: Path, scored: Result) -> Scores:
    """The scores of one training at its end; its folder stays."""
    shutil.rmtree(out, ignore_errors=True)
    settings = TrainSettings(
        model=how.model,
        out=str(out),
        seed=seed,
        lr=rate,
        eval_every=how.settings["steps"],
        **how.settings,
        **job.changes,
        **scored,
    )
    result = run(settings)
    if result.after is None:
        raise RuntimeError(f"{out}: nothing was evaluated")
    return result.after


def _score(how: Task, out: Path, scores: Scores, whole: bool) -> tuple[float, float, int]:
    """(score, its standard error over the choice of rows, rows)."""
    rows = scores.count
    if how.metric == "accuracy":
        share = scores.figures["accuracy"]
        return share, math.sqrt(share * (1 - share) / rows), rows
    if how.metric == "matthews":
        found = scores.matthews or 0.0
        return found, (1 - found**2) / math.sqrt(rows - 1), rows  # as of any correlation, for many rows
    return bleu(str(out) if whole else how.model, None if whole else out)
