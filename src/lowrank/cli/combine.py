"""`lowrank combine`: one adapter from several, from their files."""

from pathlib import Path
from typing import Literal

from cyclopts import App

from lowrank.adapters.combine import combine_adapters
from lowrank.cli.flags import AllowPickle, AsJson, Weighted, weighted
from lowrank.cli.module_bar import module_bar
from lowrank.cli.say import say_written

Method = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]

command = App(
    name="combine",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank rank --adapter demo-out/adapter --budget 8000 --out less.yaml
  lowrank resize --adapter demo-out/adapter --ranks less.yaml --out less
  lowrank combine --adapter demo-out/adapter:0.5 --adapter less:0.5 \\
      --rank 8 --out mean

Examples with your own:
  lowrank combine --adapter facts --adapter style:0.5 --out both
  lowrank combine --adapter a --adapter b --method ties --density 0.2 \\
      --rank 32 --out agreed

PEFT loads what is written.""",
)


@command.default
def combine(
    *,
    adapter: Weighted,
    out: Path,
    method: Method = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter from several: linear is exactly the sum of weight * s * B * A, with no cross terms.

    Ranks, scales and targets may differ. Where the rank is not enough for the sum, the best approximation of that rank
    is written, and the share of its energy that is kept is told.

    Parameters
    ----------
    out
        The folder to make
    method
        linear, cat and svd add the changes; ties, dare_linear, dare_ties and magnitude_prune drop entries of them
    rank
        Of the result; without it linear and cat are exact, and the others take the largest rank of the adapters
    density
        The share of entries to keep, for the methods that drop some (0.2 in TIES' paper)
    seed
        For the methods that drop at random
    """
    with module_bar("combining") as progress:
        report = combine_adapters(
            [weighted(text) for text in adapter],
            out,
            method=method,
            rank=rank,
            density=density,
            seed=seed,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    say_written(report, out, as_json)
