"""`lowrank eval`."""

from typing import Annotated

from cyclopts import App, Group, Parameter

from lowrank.cli.flags import given
from lowrank.data.settings import DataSettings
from lowrank.train.config_file import resolve
from lowrank.train.settings import EvalSettings, HeldSettings

command = App(
    name="eval",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank eval --model nano --adapter demo-out/adapter \\
      --data demo-out/data/held-out.jsonl

Examples with your own:
  lowrank eval --model llama/ --data e2e.csv --rows 312 --json \\
      --prompt-column mr --completion-column ref

Columns, template and longest length are the adapter's unless given here.""",
)


@command.default
def evaluate(
    *,
    model: str | None = None,
    data: str | None = None,
    adapter: str | None = None,
    count: Annotated[int | None, Parameter(name="--rows")] = None,
    batch_size: int | None = None,
    beta: float | None = None,
    metrics: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    rows: Annotated[DataSettings | None, Parameter(name="*", group=Group("The data", sort_key=1))] = None,
    machine: Annotated[HeldSettings | None, Parameter(name="*", group=Group("The machine", sort_key=2))] = None,
) -> None:
    """Measure a model, with or without an adapter, on a file of examples.

    Parameters
    ----------
    model
        A model: its folder, its name on the Hub (org/name), or "nano", which ships with lowrank
    data
        A file of rows, several with commas, or a folder with test.* or valid.*
    adapter
        An adapter: its folder, or its name on the Hub; the bare model where not given
    count
        Evaluate on so many rows, spread evenly over the file; all where not given
    batch_size
        Rows in one forward pass (16)
    beta
        Of preferences: DPO's β; the adapter's where not given, else 0.1
    metrics
        What to give beside the usual, names with commas: bleu, chrf, f1, rouge
    json
        Print one JSON object, for a script to read
    """
    single = {
        "model": model,
        "data": data,
        "adapter": adapter,
        "rows": count,
        "batch_size": batch_size,
        "beta": beta,
        "metrics": metrics,
    }
    settings = resolve(EvalSettings, given(rows, machine, **single))

    from lowrank.cli.console import show_evaluation
    from lowrank.train.evaluator import evaluate as measure

    show_evaluation(measure(settings), settings, json)
