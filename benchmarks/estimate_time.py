"""Claim: the time of a step that `lowrank estimate` says before a weight is loaded is within a fifth of it.

Each line is the Llama-shaped model of random weights, adapted in all linear layers at rank 16, on rows that are all as
long as the longest: what `estimate` says of this machine, and the median of real steps of the training's own loop,
optimiser included, after two that are not counted. What the estimate rests on is measured anew for each. With one
thread both are the process's own time, which other programs disturb little.

    python benchmarks/estimate_time.py [--steps 7] [--threads 1] [--dtype bf16 f32] [--shape 6x768 2x2048]
                                 [--tokens 4x256 1x256] [--out benchmarks/results/estimate_time.json]
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from common import DTYPES, RANK, SHAPES, VOCABULARY, base_model, clock_for, conditions, keep

from lowrank.data.batches import collate
from lowrank.data.tokens import Example
from lowrank.study.estimate.estimate import estimate
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.train.adapting import adapt
from lowrank.train.evaluation import Measure
from lowrank.train.head import find_head
from lowrank.train.held import load_held
from lowrank.train.loop import Loop
from lowrank.train.losses import NextToken
from lowrank.train.metrics import FIGURES
from lowrank.train.models import load_causal
from lowrank.train.packing import flattened
from lowrank.train.reporting import Reporter
from lowrank.train.settings import TrainSettings
from lowrank.train.task import Loaded

WARM_UP = 2
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activations twice": {"gradient_checkpointing": True},
    "four bits": {"quantise": "nf4"},
}


class Clock(Reporter):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def stepped(self, step: int) -> None:  # noqa: ARG002
        """After every step."""
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def steps(folder: Path, asked: TrainSettings, dtype: torch.dtype) -> list[float]:
    """Seconds of real steps, those of the warm-up left out."""
    cpu = torch.device("cpu")
    model = load_held(folder, asked, dtype, cpu, ()) if asked.quantise else load_causal(folder, dtype)
    loaded = Loaded(model, None, cpu, 0)
    adapt(loaded, asked, folder)
    draw = torch.Generator().manual_seed(2)
    rows = torch.randint(VOCABULARY, (asked.batch_size, asked.max_length or 0), generator=draw).tolist()
    clock = Clock()
    examples = [Example(row, row) for row in rows]
    measure = Measure(lambda some: collate(some, 0, cpu, True), NextToken(find_head(model)), FIGURES["text"])
    measure = replace(measure, flat=flattened(examples, "text", loaded, measure, asked.batch_size))
    Loop(model, examples, [], measure, asked, clock).run()
    return clock.seconds[WARM_UP:]


def compare(shape: str, dtype: str, tokens: str, way: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One line of the table."""
    rows, length = (int(number) for number in tokens.split("x"))
    chosen = {"model": str(folder), "rank": RANK, "targets": "all-linear", "batch_size": rows, "max_length": length}
    chosen |= {"dtype": str(DTYPES[dtype]).removeprefix("torch."), "device": "cpu", **WAYS[way]}
    said = estimate(EstimateSettings.model_validate(chosen)).seconds
    asked = TrainSettings.model_validate(chosen | {"data": "", "out": "", "steps": options.steps + WARM_UP})
    found = steps(folder, asked, DTYPES[dtype])
    took = statistics.median(found)
    line = {"shape": shape, "dtype": dtype, "tokens": tokens, "way": way, "said_s": said, "took_s": took}
    print(f"{shape} {dtype} {tokens} {way}: said {said:.3f} s, took {took:.3f} s, ratio {said / took:.2f}", flush=True)
    return line | {"said_over_took": round(said / took, 3), "runs_s": [round(s, 4) for s in found]}


def main() -> None:
    """Measure what is asked for, print it, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["6x768", "2x2048"])
    parser.add_argument("--tokens", nargs="+", default=["4x256", "1x256"], help="rows x length")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    time.perf_counter = clock_for(options.threads)  # the library's own clock too
    transformers.logging.set_verbosity_error()
    report: dict[str, Any] = {"conditions": conditions(options.threads), "lines": []}
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as folder:
            base_model(shape, torch.float32).save_pretrained(folder)
            for dtype in options.dtype:
                for tokens in options.tokens:
                    for way in options.way:
                        report["lines"].append(compare(shape, dtype, tokens, way, options, Path(folder)))
                        keep(report, options.out)


if __name__ == "__main__":
    main()
