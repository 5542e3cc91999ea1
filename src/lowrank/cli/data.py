"""`lowrank data show` and `lowrank data clear`."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter

from lowrank.cli.say import say
from lowrank.data.settings import DataSettings
from lowrank.errors import ConfigError

command = App(
    name="data",
    help="See what a data file becomes: which tokens are trained, how long rows are, what is cut; delete what is kept.",
    help_epilogue="""Example, after `lowrank demo`:
  lowrank data show --model nano --data demo-out/data/train.jsonl

Chats in a folder, the last answer of each trained, as a page:
  lowrank data show --model llama/ --data chats/ --train-on last \\
      --rows 10 --html rows.html""",
)


@command.command
def show(
    *,
    model: str,
    data: str,
    eval_data: str | None = None,
    rows: int = 3,
    tokens: Annotated[bool, Parameter(negative=())] = False,
    html: Path | None = None,
    force: Annotated[bool, Parameter(negative=())] = False,
    settings: Annotated[DataSettings | None, Parameter(name="*", group=Group("The data", sort_key=1))] = None,
) -> None:
    """Show rows with what is trained of them: green on a terminal, ⟦in brackets⟧ elsewhere.

    Parameters
    ----------
    model
        The model whose tokenizer and chat template make the rows; its weights are not read
    data
        A file of rows, several with commas, or a folder with train.*
    eval_data
        Rows that will be evaluated: those that stand among the trained ones are named; a folder's valid.* and test.*
        where not given
    rows
        So many rows are shown, spread evenly over the data
    tokens
        Put a bar between two tokens
    html
        Write them as a page too
    force
        Replace the file that --html names, where there is one
    """
    from lowrank.checkpoint.atomic import write_file
    from lowrank.cli.claim import claimed_file
    from lowrank.cli.data_display import figures, page
    from lowrank.cli.data_display import show as display
    from lowrank.data.survey import described, runs, survey
    from lowrank.train.preview import preview

    if rows < 0:
        raise ConfigError(f"--rows {rows}: give how many rows are shown, or 0")
    seen = preview(model, data, settings or DataSettings.model_validate({}), eval_data)
    examples = seen.encoded.examples
    places = [number * len(examples) // rows for number in range(min(rows, len(examples)))]
    if rows >= len(examples):
        places = list(range(len(examples)))
    shown = [
        (f"row {n + 1} of {len(examples)}: {said}", runs(example, seen.tokenizer, "|" if tokens else ""))
        for n in places
        for said, example in described(examples[n], seen.recipe)
    ]
    found = figures(survey(seen.encoded, seen.tokenizer, seen.recipe), seen.met)
    with claimed_file(html, {"data": data, "evaluation data": eval_data, "model": model}, force) as place:
        if place is not None:
            write_file(place, page(seen.summary, found, shown).encode())
    display(seen.summary, found, shown)


@command.command
def clear() -> None:
    """Delete the rows and tokens that earlier commands kept on disk.

    They are kept in LOWRANK_CACHE, or in the folder for caches of this system, and made again when they are needed.
    """
    from lowrank.data.cache.place import clear as clear_cache
    from lowrank.data.cache.place import root

    files, size = clear_cache()
    say(f"{root()}: {files:,} files deleted, {size / 1e6:,.1f} MB")
