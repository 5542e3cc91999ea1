"""`lowrank estimate`."""

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Group, Parameter

from lowrank.cli.flags import AsJson, given
from lowrank.cli.say import say
from lowrank.study.estimate.settings import EstimateSettings, StepShape
from lowrank.train.config_file import check
from lowrank.train.settings import AdapterSettings

if TYPE_CHECKING:
    from lowrank.study.estimate.estimate import Estimate

command = App(
    name="estimate",
    help_epilogue="""Examples:
  lowrank estimate --model nano
  lowrank estimate --model nano --targets all-linear --gpu T4 --json

Examples with your own:
  lowrank estimate --model org/name --gpu RTX-4090 --quantise nf4 \\
      --targets all-linear --rank 16 --max-length 2048 --micro-batch 1

  lowrank estimate --model org/name --gpu H100 --shard --processes 8 \\
      --targets all-linear --max-length 4096 --gradient-checkpointing

Only the config is read. Memory is counted. Time is measured on a processor that
is here, operation by operation, and for a GPU a guess from its data sheet.""",
)


@command.default
def estimate(
    *,
    model: str | None = None,
    full: bool | None = None,
    as_json: AsJson = False,
    adapter: Annotated[AdapterSettings | None, Parameter(name="*", group=Group("The adapter", sort_key=1))] = None,
    step: Annotated[StepShape | None, Parameter(name="*", group=Group("The step", sort_key=2))] = None,
) -> None:
    """Say what a training will take, memory by kind and time, before a weight is loaded.

    Parameters
    ----------
    model
        A language model: its folder, its name on the Hub (org/name), or "nano"
    full
        Every weight is trained instead of an adapter
    """
    settings = check(EstimateSettings, given(adapter, step, model=model, full=full))

    from lowrank.study.estimate.estimate import estimate as measure

    found = measure(settings)
    if as_json:
        say(json.dumps(found.as_json(), allow_nan=False))
        return
    for what, value in _lines(found):
        say(f"{what + ':':<14}{value}")


def _lines(found: "Estimate") -> Iterator[tuple[str, str]]:
    here = math.ceil(found.rows / found.processes)
    part = f", {here} of them in each process" if found.processes > 1 else ""
    part += f" in parts of {found.micro_batch}" if found.micro_batch < here else ""
    machine = found.machine
    yield "model", f"{found.model}, {found.parameters:,} parameters, {found.dtype}"
    yield "trained", f"{found.trained:,} parameters"
    yield "a step", f"{found.rows} rows of {found.length} tokens{part}"
    if found.processes > 1:
        yield "processes", f"{found.processes}, which share the rows of a step; all that follows is of one"
    yield "weights", size(found.weights)
    yield "factors", size(found.factors)
    yield "gradients", size(found.gradients)
    yield "optimiser", size(found.optimiser)
    yield "activations", f"{size(found.activations)}, kept for the backward pass"
    yield "logits", f"{size(found.logits)} beyond them, let go before the backward pass"
    yield "in all", f"{size(found.height)} at the most, in the {found.height_in} pass".replace("loss pass", "loss")
    verdict = "fits" if found.fits else "does not fit"
    yield "machine", f"{machine.name}, {size(machine.memory)}: {verdict}, {size(found.needed)} with the runtime's own"
    most = f"{found.largest:,} rows of {found.length} tokens" if found.largest else "not even one row fits"
    yield "micro-batch", f"{most}, the largest that fits" if found.largest else most
    speed = found.rows * found.length / found.seconds
    yield "time", f"about {found.seconds:.2g} s a step, {speed:,.0f} tokens/s"


def size(count: int) -> str:
    """Bytes as people say them, in units of a thousand."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "kB"))
    return f"{count / unit:,.1f} {name}"
