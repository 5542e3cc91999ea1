"""`lowrank train`."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter

from lowrank import launch
from lowrank.cli.flags import given
from lowrank.data.settings import DataSettings
from lowrank.errors import ConfigError
from lowrank.train.config_file import resolve
from lowrank.train.settings import AdapterSettings, LoopSettings, ShardSettings, TrainSettings
from lowrank.train.state.settings import CheckpointSettings

command = App(
    name="train",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank train --model nano --data demo-out/data/train.jsonl --out skill \\
      --steps 200 --lr 5e-3
  lowrank train --config skill/train.yaml --lr 1e-3 --out skill-slower

Examples with your own:
  lowrank train --model llama/ --data e2e.csv --out runs/e2e \\
      --prompt-column mr --completion-column ref --eval-split 0.05 \\
      --targets all-linear --rank 8 --lr 3e-3 --batch-size 32
  lowrank train --model org/name@main --data org/set:train.jsonl --out runs/hub
  lowrank train --resume runs/e2e
  torchrun --nproc-per-node 4 -m lowrank train --shard --model llama-70b/ \\
      --data rows.jsonl --out runs/large

Flags beat the lines of --config, which beat the defaults.
PEFT loads what is saved.""",
)


@command.default
def train(
    *,
    model: str | None = None,
    data: str | None = None,
    out: str | None = None,
    config: Path | None = None,
    full: bool | None = None,
    adapter: Annotated[AdapterSettings | None, Parameter(name="*", group=Group("The adapter", sort_key=1))] = None,
    rows: Annotated[DataSettings | None, Parameter(name="*", group=Group("The data", sort_key=2))] = None,
    loop: Annotated[LoopSettings | None, Parameter(name="*", group=Group("The training", sort_key=3))] = None,
    machine: Annotated[ShardSettings | None, Parameter(name="*", group=Group("The machine", sort_key=4))] = None,
    keeping: Annotated[
        CheckpointSettings | None, Parameter(name="*", group=Group("Stopping and going on", sort_key=5))
    ] = None,
    resume: Annotated[Path | None, Parameter(group=Group("Stopping and going on", sort_key=5))] = None,
) -> None:
    """Teach a model from a file of examples, and save the adapter.

    Parameters
    ----------
    model
        A model: its folder, its name on the Hub (org/name, org/name@revision), or "nano", which ships with lowrank
    data
        A file of rows (jsonl, json, csv, tsv, txt, parquet, arrow; .gz, .zst), several with commas, a folder with
        train.* and valid.*, a set on the Hub (org/name) or one file of it (org/name:FILE): chats, prompt + completion,
        text, text + label (a name or a number), chosen + rejected
    out
        The folder to make: adapter, log and resolved settings
    config
        A YAML file of settings, named as the flags are (rank: 8)
    full
        Train every weight instead, and save a whole model
    resume
        Go on with the run in this folder, with its settings; the result has the bytes of a run that was never stopped
    """
    flags = given(adapter, rows, loop, machine, keeping, model=model, data=data, out=out, full=full)
    if resume is not None:
        _resume(resume, flags, config)
        return
    settings = resolve(TrainSettings, flags, config)

    from lowrank.cli.console import RunDisplay
    from lowrank.train.trainer import run

    if not launch.is_first():  # of several processes, which speak with one voice
        run(settings)
        return
    with RunDisplay() as display:
        result = run(settings, display)
    display.finished(result, settings)


def _resume(folder: Path, flags: dict[str, object], config: Path | None) -> None:
    for name, value in (("out", flags.get("out")), ("config", config)):
        if value is not None:
            raise ConfigError(f"--resume {folder} goes on there, with the settings of that run: leave --{name} out")

    from lowrank.cli.console import RunDisplay
    from lowrank.train.state.resume import settings_of
    from lowrank.train.trainer import resume

    if not launch.is_first():
        resume(folder, None, **flags)
        return
    settings = settings_of(folder, flags)
    with RunDisplay() as display:
        result = resume(folder, display, **flags)
    display.finished(result, settings)
