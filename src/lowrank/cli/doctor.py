"""`lowrank doctor`."""

import json
from typing import Annotated

from cyclopts import App, Parameter

command = App(
    name="doctor",
    help_epilogue="""Examples:
  lowrank doctor
  lowrank doctor --model llama/ --targets all-linear --tokens 4096""",
)


@command.default
def doctor(
    *,
    model: str | None = None,
    targets: str | None = None,
    rank: int = 8,
    tokens: int = 1024,
    dtype: str = "float32",
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """What is installed, what runs fast here, and how a model's layers would be computed.

    Parameters
    ----------
    model
        A model: its folder, its name on the Hub, or "nano". Only its config is read; no weights are loaded
    targets
        What to adapt: names with commas between, "all-linear", or one regex. Default: query and value.
    rank
        The rank the layers would get.
    tokens
        Tokens in a batch: rows times length. The order of the products depends on it.
    dtype
        The base's dtype: float32, bfloat16 or float16.
    as_json
        Print one JSON object instead of tables.
    """
    from lowrank.study.doctor import describe_machine, describe_model

    machine = describe_machine()
    layers = describe_model(model, targets, rank, tokens, dtype) if model else None
    if as_json:
        print(json.dumps({"machine": machine, "model": layers.as_dict() if layers else None}, indent=2))
        return
    for what, value in machine.items():
        print(f"{what + ':':<18}{value}")
    if layers:
        print()
        print(layers)
