"""Low intrinsic dimension (§1, after Aghajanyan et al. 2020): `lowrank dimension` on SST-2, its d90 and every point."""

import os
from statistics import median

from common import RUNS, SST2, Result, kept, minilm

RECIPE = {"steps": 200, "batch_size": 16, "max_length": 64, "lr": 1e-4, "group_by_length": True, "eval_rows": 872}
LADDER = {"over": "targets", "targets": "query,value", "ladder": "1024,16384,262144", "rates": "1,10", "seeds": 2}
COMMAND = (
    "lowrank dimension --model MINILM --data SST-2/train.tsv --text-column sentence --eval-data SST-2/dev.tsv "
    "--steps 200 --batch-size 16 --max-length 64 --lr 1e-4 --over targets --targets query,value "
    "--ladder 1024,16384,262144 --rates 1,10 --seeds 2 --group-by-length --out runs/paper/dimension"
)


def measure_subspaces(again: bool = False) -> Result:
    """Every point, and d90 by both definitions, seed by seed; None where the ladder does not reach it."""
    return kept("dimension", _measured, COMMAND, again)


def _measured() -> Result:
    from lowrank.study.dimension import DimensionSettings, measure_dimension
    from lowrank.train.config_file import check

    files = {"data": os.path.relpath(SST2 / "train.tsv"), "eval_data": os.path.relpath(SST2 / "dev.tsv")}
    wanted = {"model": str(minilm()), "text_column": "sentence", "out": str(RUNS / "dimension")}
    return measure_dimension(check(DimensionSettings, {**RECIPE, **LADDER, **files, **wanted})).as_json()


def in_words(result: Result) -> str:
    """Both d90, the median and the range over the seeds that reach it."""
    gain = _spread("gain", result["of_gain"])
    return f"d90 {gain}; {_spread('accuracy', result['of_score'])}; of {result['weights']:,} weights"


def _spread(what: str, crossings: list[Result | None]) -> str:
    reached = [one["d"] for one in crossings if one is not None and one["d"] is not None]
    words = f"of the {what}: reached by {len(reached)} of {len(crossings)} seeds"
    return f"{words}, d = {median(reached):,.0f} ({min(reached):,.0f} to {max(reached):,.0f})" if reached else words


def holds(result: Result) -> bool | None:
    """Whether at most 1 % of the weights reaches 90 % of the gain in every seed; None where no d90 exists."""
    crossings = result["of_gain"]
    if any(one is None for one in crossings):
        return None
    return all(one["d"] is not None and one["d"] <= result["weights"] / 100 for one in crossings)
