"""The second table of docs/paper.md: what following `lowrank rank` gave, from the kept results and nothing else."""

import statistics
from collections.abc import Sequence

from common import Result
from rank_choice import TRAINED, UNIFORM
from verdicts import MISSING

BEGIN, END = "<!-- ranks -->", "<!-- /ranks -->"
HEAD = (
    "| ranks from | task | measured | uniform | proposed | difference, seed by seed | seeds | what it gave |\n"
    "|---|---|---|---|---|---|---|---|"
)
METRIC = {"sst2": ("accuracy, %", "accuracy", 100.0), "e2e": ("loss", "loss", -1.0)}  # the sign turns down into better
NAMES = {"sst2": "SST-2, q and v", "e2e": "E2E, all linear layers"}


def table(results: dict[str, Result]) -> str:
    """Two lines a task: trained with the proposed ranks, and resized to them."""
    lines = []
    for task in NAMES:
        uniform, proposed = (_by_seed(results, f"ranks-{task}-{arm}-seed") for arm in ("uniform", "gradient"))
        lines.append(_line(f"the gradient, before training (uniform: {UNIFORM})", task, uniform, proposed))
        resized = _by_seed(results, f"ranks-{task}-resized-seed")
        low = TRAINED[task][1]
        arms = ({seed: one[arm] for seed, one in resized.items()} for arm in ("uniform", "spectrum"))
        lines.append(_line(f"ΔW, resized after training (uniform: {low})", task, *arms))
    return "\n".join([HEAD, *("| " + " | ".join(cells) + " |" for cells in lines)])


def _by_seed(results: dict[str, Result], start: str) -> dict[int, Result]:
    return {one["seed"]: one for name, one in sorted(results.items()) if name.startswith(start)}


def _line(origin: str, task: str, uniform: dict[int, Result], proposed: dict[int, Result]) -> list[str]:
    title, key, unit = METRIC[task]
    seeds = sorted(uniform.keys() & proposed.keys())
    if not seeds:
        return [origin, NAMES[task], title, "-", "-", "-", "-", MISSING]
    ours, theirs = ([unit * arm[seed][key] for seed in seeds] for arm in (proposed, uniform))
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    means = [f"{abs(statistics.mean(values)):.{_digits(unit)}f}" for values in (theirs, ours)]
    each = ", ".join(f"{(gain if unit > 0 else -gain):+.{_digits(unit)}f}" for gain in gains)
    return [origin, NAMES[task], title, *means, each, ", ".join(map(str, seeds)), verdict(gains)]


def _digits(unit: float) -> int:
    return 1 if unit > 0 else 3


def verdict(gains: Sequence[float]) -> str:
    """Better or worse where the mean difference is beyond two standard errors of it over at least three seeds."""
    if len(gains) < 3:
        return "too few seeds to say"
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    if abs(mean) <= 2 * error:
        return "no difference seen"
    return "better than uniform" if mean > 0 else "worse than uniform"
