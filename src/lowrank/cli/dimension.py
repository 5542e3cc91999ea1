"""`lowrank dimension`."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Group, Parameter

from lowrank.cli.flags import given
from lowrank.cli.say import say
from lowrank.data.settings import DataSettings
from lowrank.study.dimension.settings import DimensionSettings, LadderSettings, TrainingSettings
from lowrank.train.config_file import resolve
from lowrank.train.settings import MachineSettings

if TYPE_CHECKING:
    from lowrank.study.dimension import Crossing, Measured
    from lowrank.study.dimension.training import Point

command = App(
    name="dimension",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank dimension --model nano --data demo-out/data/train.jsonl --out d90 \\
      --steps 100 --lr 1e-3 --ladder 16,256,4096 --seeds 1 --eval-rows 200

Examples with your own:
  lowrank dimension --model bert/ --data sst2.tsv --text-column sentence \\
      --steps 200 --batch-size 16 --ladder 16,128,1024,8192 --out runs/d90

Finished trainings stay in --out: the same command goes on where it was
stopped, and may ask for more seeds or a longer ladder.""",
)


@command.default
def dimension(
    *,
    model: str | None = None,
    data: str | None = None,
    out: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    ladder: Annotated[LadderSettings | None, Parameter(name="*", group=Group("The subspaces", sort_key=1))] = None,
    rows: Annotated[DataSettings | None, Parameter(name="*", group=Group("The data", sort_key=2))] = None,
    loop: Annotated[TrainingSettings | None, Parameter(name="*", group=Group("Every training", sort_key=3))] = None,
    machine: Annotated[MachineSettings | None, Parameter(name="*", group=Group("The machine", sort_key=4))] = None,
) -> None:
    """Measure a task's intrinsic dimension: in how small a random subspace of the weights it can be learned.

    Parameters
    ----------
    model
        A model: its folder, its name on the Hub (org/name), or "nano", which ships with lowrank
    data
        A file of rows, several with commas, a folder, or one on the Hub, as `lowrank train` takes them
    out
        The folder of the finished trainings, the figure and the numbers
    json
        Print every number instead of words
    """
    settings = resolve(DimensionSettings, given(ladder, rows, loop, machine, model=model, data=data, out=out), None)

    from pathlib import Path

    from lowrank.analysis.figures.dimension import dimension_curve, dimension_page
    from lowrank.checkpoint.atomic import write_file
    from lowrank.study.dimension import measure_dimension

    def told(name: str, point: "Point | None") -> None:
        if point is not None and not json:
            say(f"{name + ':':<22} {point.trained:>12,} trained  loss {point.loss:.4f}  accuracy {point.accuracy:.2%}")

    def drawn(measured: "Measured", folder: Path) -> None:
        curve = {d: [p.score for p in measured.points if p.name == str(d)] for d in settings.ladder}
        levels = {name: fmean(p.score for p in measured.points if p.name == name) for name in ("full", "frozen")}
        levels["90 % of the gain"] = levels["frozen"] + 0.9 * (levels["full"] - levels["frozen"])
        metric = "accuracy" if measured.metric == "accuracy" else "minus the loss"
        figure = dimension_curve({d: scores for d, scores in curve.items() if scores}, levels, metric)
        write_file(folder / "dimension.html", dimension_page(figure, in_words(measured, settings.ladder)).encode())

    measured = measure_dimension(settings, told, finish=drawn)
    if json:
        import json as writer

        say(writer.dumps(measured.as_json(), indent=2))
        return
    say(*in_words(measured, settings.ladder), f"figure: {settings.out}/dimension.html")


def in_words(measured: "Measured", ladder: Sequence[int]) -> list[str]:
    """What came out, a sentence each."""
    without = sum(found is None for found in measured.of_gain)
    seeds = len(measured.of_gain)
    lines = []
    if without:
        lines.append(
            f"In {without} of {seeds} seeds full fine-tuning did not beat frozen features: there is no d90; "
            "try more --steps or another --lr."
        )
    lines += _about("90 % of the gain of full fine-tuning over frozen features", measured.of_gain, measured, ladder)
    lines += _about("90 % of full fine-tuning's accuracy", measured.of_score, measured, ladder)
    return lines


def _about(what: str, found: "Sequence[Crossing | None]", measured: "Measured", ladder: Sequence[int]) -> list[str]:
    crossings = [one for one in found if one is not None]
    if not crossings:
        return []
    reached = [one.d for one in crossings if one.d is not None]
    if not reached:
        return [f"{what}: not reached with d = {ladder[-1]:,} in any of {len(crossings)} seeds; extend --ladder."]
    least = "at most " if any(one.at_most for one in crossings) else ""
    share = f"{median(reached) / measured.weights:.2g} of the {measured.weights:,} weights"
    words = f"{what}: d90 is {least}{median(reached):,.0f} ({share}); "
    spread = f"from {min(reached):,.0f} to {max(reached):,.0f} over {len(reached)} seeds"
    missing = len(crossings) - len(reached)
    return [words + spread + (f", and not reached in {missing} more." if missing else ".")]
