"""What following `lowrank rank` gave: its ranks beside a uniform rank of as many parameters, before and after training.

before  trained with the ranks that the gradient proposes, beside uniform rank 4, at one learning rate
after   a trained adapter, resized without training to the ranks that its ΔW proposes, beside a uniform lower rank
"""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common import RUNS, Result, kept
from tasks import Job, tasks
from trainings import SEEDS, run_task

from lowrank.adapters.resize import resize_adapter
from lowrank.checkpoint import read_adapter
from lowrank.study.rank import AdapterRankSettings, Choice, GradientRankSettings, from_adapter, from_gradient
from lowrank.train.evaluator import evaluate
from lowrank.train.settings import EvalSettings

UNIFORM = 4
TARGETS = {"sst2": "query,value", "e2e": "all-linear"}
RATE = {"sst2": 2e-3, "e2e": 1e-2}
TRAINED = {"sst2": ("qv-r64", 4), "e2e": ("all-r8", 2)}  # the adapter to resize, and the uniform rank to go down to
COMMAND = "python scripts/paper --ranks"


def measure_ranks(again: bool = False) -> Iterator[Result]:
    """Every training and every resizing, seed by seed."""
    for seed in SEEDS:
        for task in TARGETS:
            jobs = {arm: partial(before, task, arm, seed) for arm in ("uniform", "gradient")}
            for name, job in {**jobs, "resized": partial(after, task, seed)}.items():
                yield kept(f"ranks-{task}-{name}-seed{seed}", job, COMMAND, again)


def scored(task: str) -> Result:
    """The rows to score on."""
    how = tasks()[task]
    if task != "e2e":
        return how.scored
    return {"eval_data": str(Path(how.settings["data"]).with_name("devset.csv")), "eval_rows": 1000}


def before(task: str, arm: str, seed: int) -> Result:
    """One training; the gradient is taken with the training's seed, so with its new head."""
    found = propose(task, seed) if arm == "gradient" else None
    changes: dict[str, Any] = {"targets": TARGETS[task], "rank": UNIFORM} if found is None else found.config
    out = RUNS / f"ranks-{task}-{arm}-seed{seed}"
    scores = run_task(tasks()[task], Job(changes), RATE[task], seed, out, scored(task))
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "rate": RATE[task],
        "accuracy": scores.accuracy,
        "loss": scores.loss,
        "low_rank_parameters": count(out),
        "ranks": UNIFORM if found is None else list(found.proposal.ranks),
    }


def propose(task: str, seed: int) -> Choice:
    """The ranks for the numbers of the uniform one."""
    how = tasks()[task]
    names = ("data", "text_column", "prompt_column", "completion_column", "max_length")
    data = {name: how.settings[name] for name in names if name in how.settings}
    return from_gradient(GradientRankSettings(model=how.model, targets=TARGETS[task], rank=UNIFORM, seed=seed, **data))


def after(task: str, seed: int) -> Result:
    """The scores of a trained adapter as it is, at a uniform lower rank, and at the ranks its ΔW proposes."""
    job, uniform = TRAINED[task]
    trained = RUNS / f"{task}-{job}-seed{seed}"
    config = from_adapter(AdapterRankSettings(adapter=str(trained), rank=uniform)).config
    arms = {"uniform": {"rank": uniform}, "spectrum": {"rank": config["rank"], "ranks": config["rank_pattern"]}}
    found: Result = {"trained": _evaluated(task, trained)}
    for arm, how in arms.items():
        out = RUNS / "resized" / f"{task}-{arm}-seed{seed}"
        shutil.rmtree(out, ignore_errors=True)
        report = resize_adapter(trained, out, **how)
        shutil.copy(trained / "run.json", out)  # how rows become tokens, for the evaluation
        found[arm] = {**_evaluated(task, out), "kept": report.kept, "low_rank_parameters": count(out)}
    return {"task": task, "seed": seed, "adapter": f"{task}-{job}", "uniform_rank": uniform, **found}


def _evaluated(task: str, adapter: Path) -> Result:
    how, rows = tasks()[task], scored(task)
    asked = EvalSettings(model=how.model, data=rows["eval_data"], adapter=str(adapter), rows=rows.get("eval_rows"))
    found = evaluate(asked).scores
    return {"accuracy": found.accuracy, "loss": found.loss}


def count(folder: Path) -> int:
    """Numbers in all A and B."""
    files = read_adapter(folder)
    return sum(sum(factor.numel() for factor in files.pair(path)) for path in files.low_rank)
