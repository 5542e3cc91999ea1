"""`lowrank init`."""

from cyclopts import App

from lowrank.cli.flags import given
from lowrank.cli.say import say

command = App(
    name="init",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank init
  lowrank init --model nano --data demo-out/data/train.jsonl --out from-file

Into a file, for `train`:
  lowrank init > run.yaml
  lowrank train --config run.yaml --model llama/ --data rows.jsonl --out a""",
)


@command.default
def init(*, model: str | None = None, data: str | None = None, out: str | None = None) -> None:
    """Write a file of all settings of a training, with what they mean.

    It goes to standard output: `lowrank init > run.yaml`. Every setting is there with its default, as a line
    of comment; take its # away and change it.

    Parameters
    ----------
    model
        A model to write down: its folder, its name on the Hub (org/name), or "nano"
    data
        Data to write down: what --data of `train` takes
    out
        The folder that the run is to make
    """
    from lowrank.train.views.settings_file import settings_file

    say(settings_file(given(model=model, data=data, out=out)).rstrip())
