"""Going on with a run: the settings that it has, which of them may change, and whether all else is as it was."""

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lowrank import __version__
from lowrank.data.recipe import SETTINGS
from lowrank.errors import CheckpointError, ConfigError, LowrankWarning, some
from lowrank.train import processes
from lowrank.train.config_file import read_yaml, resolve
from lowrank.train.settings import TrainSettings
from lowrank.train.sharding import is_in_parts
from lowrank.train.state.settings import CheckpointSettings
from lowrank.train.state.value import About
from lowrank.train.task import Loaded

# What changes no number of a step. Places may change, since what lies there is compared by its content.
FREE = {
    "steps",
    "epochs",
    "eval_every",
    "metrics",
    "log_every",
    "log_to",
    "sample_prompts",
    "sample_tokens",
    "cache",
    "device",
    "model",
    "data",
    "out",
    "shard",
    *CheckpointSettings.model_fields,
}
BEFORE = {"optimizer": "adamw-unfused"}  # of a run that an older version began, where the default was another
OF_EVALUATION = {"eval_data", "eval_rows"}  # free where the best weights are not chosen by it


def settings_of(folder: Path, changes: Mapping[str, object]) -> TrainSettings:
    """The settings of the run in a folder, with these changed. Raises ConfigError where there is no run."""
    if not (folder / SETTINGS).is_file():
        raise ConfigError(f"--resume {folder}: there is no run, it holds no {SETTINGS}; start one with --out {folder}")
    older = BEFORE.keys() - read_yaml(folder / SETTINGS, TrainSettings).keys()
    flags = {name: BEFORE[name] for name in older} | {**changes, "out": str(folder)}
    return resolve(TrainSettings, flags, folder / SETTINGS)


def about(settings: TrainSettings, steps: int, made_of: dict[str, str], loaded: Loaded) -> About:
    """What a run is, here and now."""
    parts = ", each with a part of the base" if is_in_parts(loaded.model) else ""
    machine = {
        "lowrank": __version__,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "device": loaded.device.type,
        "processes": f"{processes.count()}{parts}",
    }
    if settings.quantise or settings.optimizer == "adamw8bit":  # whose numbers are its
        machine["bitsandbytes"] = version("bitsandbytes")
    return About(steps=steps, settings=dict(settings.resolved()), made_of=made_of, machine=machine)


def check_settings(then: About, settings: TrainSettings) -> None:
    """Raise ConfigError, naming all, for settings that may not change on the way."""
    if changed := _changed(then.settings, settings.resolved()):
        what = some(changed, 5)
        raise ConfigError(f"--resume {settings.out}: {what} cannot change on the way; leave it out, or begin a new run")


def check_same(folder: str, then: About, now: About, step: int) -> None:
    """Raise CheckpointError where a run would go on with other data, and ConfigError where it is past its end.

    Warns where the machine is another: the run goes on, but no longer bit for bit.
    """
    if now.steps < step:
        raise ConfigError(f"--resume {folder}: the run is at step {step} already, and {now.steps} are asked for")
    other = [name for name, digest in then.made_of.items() if now.made_of.get(name) != digest]
    if other:
        raise CheckpointError(
            f"--resume {folder}: {some(other, 5)} {'is' if len(other) == 1 else 'are'} not what the run began with: "
            "give back what was there, or begin a new run"
        )
    if moved := [
        f"{name} {value} (was {then.machine.get(name)})"
        for name, value in now.machine.items()
        if then.machine.get(name) != value
    ]:
        warnings.warn(
            f"--resume {folder}: {some(moved, 5)}: the run goes on, but not bit for bit as it would have there",
            LowrankWarning,
            stacklevel=2,
        )


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ and may not, in words."""
    chosen = now.get("keep") != "last" or now.get("patience") is not None
    free = FREE if chosen else FREE | OF_EVALUATION
    fields = TrainSettings.model_fields
    usual = {
        name: list(f.default) if isinstance(f.default, tuple) else f.default for name, f in fields.items()
    } | BEFORE
    before = {name: then.get(name, usual[name]) for name in now}  # an older version did not have all of them
    return [
        f"--{name.replace('_', '-')} {value} (the run has {before[name]})"
        for name, value in now.items()
        if name not in free and value != before[name]
    ]
