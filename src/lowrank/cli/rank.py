"""`lowrank rank`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter

from lowrank.cli.flags import AllowPickle, given
from lowrank.data.settings import DataSettings
from lowrank.study.rank.settings import AdapterRankSettings, GradientRankSettings, GradientRows
from lowrank.train.config_file import check
from lowrank.train.settings import MachineSettings, TargetSettings

if TYPE_CHECKING:
    from lowrank.study.rank.choice import Choice

command = App(
    name="rank",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank rank --model nano --data demo-out/data/train.jsonl \\
      --targets all-linear --rank 8 --out ranks.yaml
  lowrank train --config ranks.yaml --model nano \\
      --data demo-out/data/train.jsonl --out by-rank --steps 200 --lr 5e-3
  lowrank rank --adapter demo-out/adapter --energy 0.95
  lowrank rank --adapter demo-out/adapter --budget 8000 --out fewer.yaml
  lowrank resize --adapter demo-out/adapter --ranks fewer.yaml --out fewer

The ranks are a heuristic: what holds a matrix's energy need not be what
training needs. Measure what they gave.""",
)


@command.default
def rank(
    *,
    model: str | None = None,
    data: str | None = None,
    adapter: str | None = None,
    energy: float | None = None,
    budget: int | None = None,
    out: Path | None = None,
    force: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    allow_pickle: AllowPickle = False,
    targets: Annotated[TargetSettings | None, Parameter(name="*", group=Group("The targets", sort_key=1))] = None,
    gradient: Annotated[GradientRows | None, Parameter(name="*", group=Group("The gradient", sort_key=2))] = None,
    rows: Annotated[DataSettings | None, Parameter(name="*", group=Group("The data", sort_key=3))] = None,
    machine: Annotated[MachineSettings | None, Parameter(name="*", group=Group("The machine", sort_key=4))] = None,
) -> None:
    """Say which rank each module needs: from the gradient before training, or from an adapter after it.

    Parameters
    ----------
    model
        Before training: a model, its folder, its name on the Hub, or "nano"
    data
        Before training: rows to take the gradient on, as `lowrank train` takes them
    adapter
        After training: an adapter, its folder or its name on the Hub, whose ΔW is measured exactly
    energy
        The share of a module's energy (its sum of σ²) that its rank should hold; 0.9 where not given
    budget
        Numbers to give out to all A and B; before training those of the uniform --rank where not given. After
        it every module gets the rank that holds --energy, where neither --budget nor --rank is given
    out
        A YAML file to write the ranks to, for `train --config` or `resize --ranks`
    force
        Replace the file that --out names, where there is one
    json
        Print every number as one JSON object
    """
    from lowrank.cli.claim import claimed_file
    from lowrank.cli.rank_display import show, write

    flags = given(targets, gradient, rows, machine, model=model, data=data, energy=energy, budget=budget)
    with claimed_file(out, {"adapter": adapter, "base model": model, "data": data}, force) as place:
        choice = _chosen(flags, adapter, allow_pickle)
        if place is not None:
            write(choice, place)
    show(choice, out, as_object=json)


def _chosen(flags: dict[str, Any], adapter: str | None, allow_pickle: bool) -> "Choice":
    if adapter is None:
        from lowrank.cli.module_bar import module_bar
        from lowrank.study.rank.choice import from_gradient

        settings = check(GradientRankSettings, flags)
        with module_bar("gradient") as progress:
            return from_gradient(settings, progress)
    from lowrank.errors import ConfigError
    from lowrank.study.rank.choice import from_adapter

    if idle := sorted(flags.keys() - AdapterRankSettings.model_fields):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ConfigError(f"--adapter is measured from its own files, so {named} cannot be meant with it")
    return from_adapter(check(AdapterRankSettings, {**flags, "adapter": adapter, "allow_pickle": allow_pickle}))
