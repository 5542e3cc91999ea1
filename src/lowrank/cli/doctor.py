"""`lowrank doctor`."""

import json
from typing import Annotated

from cyclopts import App, Parameter

from lowrank.cli.flags import given
from lowrank.cli.say import say
from lowrank.errors import ConfigError

command = App(
    name="doctor",
    help_epilogue="""Examples:
  lowrank doctor
  lowrank doctor --model nano --targets all-linear --tokens 4096""",
)


@command.default
def doctor(
    *,
    model: str | None = None,
    targets: str | None = None,
    rank: int | None = None,
    tokens: int | None = None,
    dtype: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """What is installed, what runs fast here, and how a model's layers would be computed.

    Parameters
    ----------
    model
        A model: its folder, its name on the Hub, or "nano". Only its config is read; no weights are loaded
    targets
        What to adapt: names with commas between, "all-linear", or one regex; query and value if not given
    rank
        The rank the layers would get (8)
    tokens
        Tokens in a batch: rows times length (1024). The order of the products depends on it
    dtype
        The base's dtype: float32 (where not given), bfloat16 or float16
    as_json
        Print one JSON object instead of tables
    """
    if model is None and (asked := given(targets=targets, rank=rank, tokens=tokens, dtype=dtype)):
        raise ConfigError(f"--{next(iter(asked))} is about the layers of a model: give --model too")

    from lowrank.study.doctor import describe_machine, describe_model

    layers = None
    if model is not None:  # first, since here a wrong call is seen
        rank, tokens = 8 if rank is None else rank, 1024 if tokens is None else tokens
        layers = describe_model(model, targets, rank, tokens, dtype or "float32")
    machine = describe_machine()
    if as_json:
        say(json.dumps({"machine": machine, "model": layers.as_dict() if layers else None}, indent=2))
        return
    for what, value in machine.items():
        say(f"{what + ':':<18}{value}")
    if layers:
        say("", layers)
