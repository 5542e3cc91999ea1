"""`lowrank extract`: an adapter from two checkpoints."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from lowrank.adapters.extract import extract_adapter
from lowrank.cli.base import base_folder
from lowrank.cli.flags import AsJson
from lowrank.cli.module_bar import module_bar
from lowrank.cli.say import say_written

command = App(
    name="extract",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank extract --model nano --tuned demo-out/merged --rank 8 --out found

Examples with your own:
  lowrank extract --model base --tuned tuned --energy 0.95 --rank 64 \\
      --out adapter --save-rest --json

PEFT loads what is written.""",
)


@command.default
def extract(
    *,
    model: Path,
    tuned: Path,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    targets: list[str] | None = None,
    embeddings: Annotated[bool, Parameter(negative="")] = False,
    save_rest: Annotated[bool, Parameter(negative="")] = False,
    exact: Annotated[bool, Parameter(negative="")] = False,
    prefix: str = "",
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of what a tuned checkpoint has beyond its base: the best low-rank approximation of every change.

    Both are read from their files, block by block; no model is built. What factors cannot hold (norms, biases, lookup
    tables) is told, or kept in full with --save-rest.

    Parameters
    ----------
    model
        The base: a folder with safetensors weights, one weight file, or a name on the Hub
    tuned
        The same model after training
    out
        The folder to make
    rank
        Of every module; with --energy, the most it may be
    energy
        The share of each change to keep, from 0 to 1; every module gets the rank that takes
    targets
        Names of the modules to adapt, by their last part; repeat the flag for several; all matrices where not given
    embeddings
        Adapt lookup tables too
    save_rest
        Keep what else changed in full, as modules_to_save and trained biases
    exact
        A full SVD of every change, much slower
    prefix
        Put in front of the files' names, where the model's modules have one (transformer.)
    seed
        Of the random start of the decomposition
    """
    with module_bar("extracting") as progress:
        report = extract_adapter(
            base_folder(model),
            base_folder(tuned),
            out,
            rank=rank,
            energy=energy,
            targets=targets,
            embeddings=embeddings,
            save_rest=save_rest,
            exact=exact,
            prefix=prefix,
            seed=seed,
            progress=progress,
        )
    say_written(report, out, as_json)
