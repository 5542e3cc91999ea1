"""What a base in four bits costs in quality, and what each merge keeps of it: the table of docs/quantised.md.

E2E onto stories260K (loss per token of held-out answers) and SST-2 onto all-MiniLM-L6-v2 (accuracy on the dev set),
five seeds each: LoRA over the float base, over NF4, and over NF4 from LoftQ's start; and after each of three merges.

    python scripts/quantised_quality.py [--most N]     train what is not kept yet, N runs at most, then write the table

A run is kept when it is done, so that whoever is stopped starts again where that was.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported anywhere
sys.path.insert(0, str(Path(__file__).parent / "paper"))

import torch
from common import DATA, ROOT, SST2, STORIES, Result, conditions, minilm

import lowrank
from lowrank.data.dataset import read_dataset
from lowrank.data.recipe import make_recipe, read_recipe
from lowrank.data.tokens import encode
from lowrank.injection.adapters import lora_layers
from lowrank.merge.onto import dequantise_rest, quantised_layers, requantised
from lowrank.train.evaluation import Scores, score
from lowrank.train.models import longest_row
from lowrank.train.settings import EvalSettings, TrainSettings
from lowrank.train.task import Loaded, load
from lowrank.train.trainer import run

KEPT = ROOT / "benchmarks" / "results" / "quantised_quality.json"
PAGE = ROOT / "docs" / "quantised.md"
BEGIN, END = "<!-- quality -->", "<!-- /quality -->"
SEEDS = (0, 1, 2, 3, 4)
WAYS: dict[str, Result] = {
    "float": {},
    "nf4": {"quantise": "nf4"},
    "nf4-loftq": {"quantise": "nf4", "init": "loftq"},
}
MERGES = ("16bit", "original", "quantised")
SHARED: Result = {"targets": "all-linear", "rank": 8, "batch_size": 16, "steps": 100, "group_by_length": True}


def tasks() -> dict[str, Result]:
    """The settings of each task's trainings, beside what all of them share."""
    return {
        "e2e": {
            "model": str(STORIES),
            "data": str(DATA / "e2e/trainset.csv"),
            "eval_data": str(DATA / "e2e/devset.csv"),
            "eval_rows": 312,
            "prompt_column": "mr",
            "completion_column": "ref",
            "lr": 1e-2,
        },
        "sst2": {
            "model": str(minilm()),
            "data": str(SST2 / "train.tsv"),
            "eval_data": str(SST2 / "dev.tsv"),
            "text_column": "sentence",
            "max_length": 64,
            "lr": 2e-3,
        },
    }


def main() -> None:
    """Train what is asked for, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, help="so many runs at most; all where not given")
    asked = parser.parse_args()
    if lacks := [str(place.relative_to(ROOT.parent)) for place in (SST2, DATA / "e2e", STORIES) if not place.is_dir()]:
        print(f"skipped: needs {', '.join(lacks)}")
        return
    warnings.filterwarnings("ignore")
    for task, way, seed in list(open_runs())[: asked.most]:
        found = one_run(task, way, seed)
        keep(f"{task} {way} {seed}", found)
        print(task, way, seed, json.dumps(found), flush=True)
    write(kept()["runs"])


def kept() -> Result:
    """All that was kept so far."""
    return json.loads(KEPT.read_text()) if KEPT.is_file() else {"runs": {}}


def keep(name: str, found: Result) -> None:
    """In place: the file has one run more."""
    runs = kept()["runs"] | {name: found}
    part = KEPT.with_suffix(".part")
    part.write_text(json.dumps({"conditions": conditions(), "settings": SHARED, "runs": runs}, indent=1) + "\n")
    part.replace(KEPT)


def open_runs() -> Iterator[tuple[str, str, int]]:
    """What is not kept yet, a seed at a time, so that what is there when one stops is balanced."""
    done = kept()["runs"]
    for seed in SEEDS:
        for task in tasks():
            yield from ((task, way, seed) for way in WAYS if f"{task} {way} {seed}" not in done)


def one_run(task: str, way: str, seed: int) -> Result:
    """Train, and score the adapted model and what each merge makes of it."""
    how = tasks()[task]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = TrainSettings(out=str(out), seed=seed, eval_every=SHARED["steps"], **SHARED, **how, **WAYS[way])
        result = run(settings)
        assert result.before is not None and result.after is not None
        found: Result = {"before": figure(result.before), "adapted": figure(result.after)}
        for onto in MERGES if settings.quantise else MERGES[:1]:
            found[onto], found[f"{onto} left"] = merged(settings, out, onto)
    return found


def merged(settings: TrainSettings, adapter: Path, onto: str) -> tuple[float, float | None]:
    """(the figure after the merge, the median share of ‖ΔW‖² that requantising leaves, where it is requantised)."""
    held = None if onto == "original" else settings.quantise
    asked = EvalSettings(model=settings.model, data=str(settings.eval_data), quantise=held)
    trained = read_recipe(adapter)
    assert trained is not None
    loaded = load(Path(settings.model), trained.kind, trained.labels, asked)
    lowrank.load_adapter(loaded.model, adapter)
    left = None
    if onto == "quantised":
        layers = quantised_layers(list(lora_layers(loaded.model)))
        left = statistics.median(requantised(layer, ("default",))[0] for layer in layers.values())
    lowrank.merge_and_unload(loaded.model, onto="quantised" if onto == "quantised" else "16bit", anyway=True)
    dequantise_rest(loaded.model, torch.float32)  # bitsandbytes' own layers compute in bfloat16 on some processors
    return figure(scored(loaded, settings, trained)), left


def scored(loaded: Loaded, settings: TrainSettings, trained: Any) -> Scores:
    """The scores on the rows that the training was evaluated on."""
    data = read_dataset(str(settings.eval_data), settings).spread(settings.eval_rows)
    longest = longest_row(loaded.model, loaded.tokenizer, settings.max_length)
    recipe = make_recipe(settings, data.kind, loaded.tokenizer, longest, trained.labels, trained, data.speaks)
    rows = encode(data, loaded.tokenizer, recipe).examples
    return score(loaded.model, rows, loaded.measure(recipe), settings.batch_size)


def figure(scores: Scores) -> float:
    """Accuracy where rows are classified, else the loss."""
    return scores.loss if scores.matthews is None else scores.figures["accuracy"]


def write(runs: dict[str, Result]) -> None:
    """Put the table between its markers of the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(runs)}\n{END}{rest.split(END)[1]}")


def table(runs: dict[str, Result]) -> str:
    """One line for a task and a way to train."""
    columns = ("before", "adapted", *MERGES)
    lines = [
        f"| task, base | {' | '.join(columns)} | ‖ΔW‖² left, quantised | seeds |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for task, words in (("e2e", "E2E, loss"), ("sst2", "SST-2, accuracy")):
        for way in WAYS:
            found = [run for seed in SEEDS if (run := runs.get(f"{task} {way} {seed}"))]
            if found:
                cells = [spread([run[name] for run in found if name in run]) for name in columns]
                left = [run["quantised left"] for run in found if run.get("quantised left") is not None]
                share = f"{statistics.mean(left):.0%}" if left else "-"
                lines.append(f"| {words}, {way} | {' | '.join(cells)} | {share} | {len(found)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
