"""The folder of a run: claimed before the work, filled while it goes on, complete when it ends.

log.jsonl      one record a line: steps and evaluations
train.yaml     every setting, as it was resolved; `lowrank train --config` reads it
run.json       how rows were made into tokens, and what came out
adapter_*      the adapter, in PEFT's format (or a whole model, with full)
checkpoints/   while the run lasts, what it goes on from (`train.state`); afterwards where that was asked for

run.json and the adapter come at the end, together. A folder with the first two alone is what a run leaves that ended
before its first checkpoint; it is there to be looked at, and the next run may have it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.checkpoint.atomic import sync, write_file
from lowrank.checkpoint.outputs import entries, new_folder
from lowrank.checkpoint.temporaries import delete, leftovers, sweep, temporary
from lowrank.data.recipe import FILE, SETTINGS
from lowrank.errors import OutputError
from lowrank.train.models import quiet
from lowrank.train.sinks.tensorboard import FOLDER as EVENTS
from lowrank.train.state.settings import CheckpointSettings
from lowrank.train.state.store import FOLDER as CHECKPOINTS
from lowrank.train.state.store import remove_all, steps_kept

LOG = "log.jsonl"
RESULT = "result"  # its hidden name is where the adapter or model is written before it is put in place
LAST = (".safetensors", ".index.json", "adapter_config.json")  # without these, a folder is no adapter and no model


def new_run(place: Path) -> None:
    """Raise OutputError where `place` holds anything but what a run left that saved nothing."""
    finish(place)
    if any(steps_kept(place)):
        raise OutputError(
            f"{place} holds a run that is not finished: go on with --resume {place}, give a new folder, or delete it"
        )
    if LOG not in (held := entries(place)) or not set(held) <= {LOG, SETTINGS, CHECKPOINTS, EVENTS}:
        new_folder(place)


def finish(place: Path) -> None:
    """A run that was killed while it put its result in place has trained and written everything: put it there now."""
    for beside in leftovers(place):
        if beside.name.startswith(f".{RESULT}.") and (place / FILE).exists() and not (beside / FILE).exists():
            _move(beside, place)
            delete(beside)
    sweep(place / CHECKPOINTS)


def begin(folder: Path, settings: Mapping[str, object]) -> None:
    """Make the folder, an empty log, and write the settings down. Raises OutputError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).write_bytes(b"")  # first: with it, the folder is known for a run's
        remove_all(folder)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror or error}): give another --out") from error
    write_settings(folder, settings)


def write_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """Write train.yaml."""
    import yaml

    write_file(folder / SETTINGS, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).encode())


def complete(
    folder: Path, record: Mapping[str, Any], save: Callable[[Path], None], files: Mapping[str, bytes] | None = None
) -> None:
    """Put what `save(FOLDER)` writes into `folder`, and run.json with it: nobody sees one without the other.

    files: what else goes beside them, by name.

    What makes an adapter or a model of the folder comes last. Where the disk refuses, all of it goes to a new folder
    elsewhere, and the OutputError that is raised says where. Nothing else is left behind.
    """
    try:
        _complete(folder, record, save, files or {})
    except (OSError, OutputError) as error:
        kept = _elsewhere(folder, record, save, files or {})
        where = f"what was trained is in {kept} instead" if kept else "no other place could be written either"
        raise OutputError(f"{folder}: the result cannot be written ({_reason(error)}); {where}") from error


def settle(folder: Path, settings: CheckpointSettings) -> None:
    """The checkpoints of a run that is complete go, unless some were asked for."""
    if settings.keep_checkpoints is None:
        remove_all(folder)


def _complete(
    folder: Path, record: Mapping[str, Any], save: Callable[[Path], None], files: Mapping[str, bytes]
) -> None:
    beside = temporary(folder / RESULT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(beside)
        write_file(beside / FILE, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
        for name, content in files.items():
            write_file(beside / name, content)
    except BaseException:
        delete(beside)
        raise
    _move(beside, folder)
    delete(beside)


def _move(beside: Path, folder: Path) -> None:
    for path in sorted(beside.iterdir(), key=_turn):
        os.replace(path, folder / path.name)
    sync(folder)


def _turn(path: Path) -> int:
    """When a file of the result is put in its place: run.json first, and last what makes a result of the folder."""
    if path.name == FILE:
        return 0
    return 1 + max((i for i, ending in enumerate(LAST, 1) if path.name.endswith(ending)), default=0)


def _reason(error: BaseException) -> str:
    """What the disk said: the first cause has it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "strerror", None) or error)


def _elsewhere(
    folder: Path, record: Mapping[str, Any], save: Callable[[Path], None], files: Mapping[str, bytes]
) -> Path | None:
    """A new folder with the result and what `folder` holds, on whichever disk takes it; None where none does."""
    for place in dict.fromkeys((tempfile.gettempdir(), os.path.expanduser("~"), os.getcwd())):
        try:
            made = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=place))
        except OSError:
            continue
        try:
            _complete(made, record, save, files)
        except (OSError, OutputError):
            delete(made)
            continue
        with suppress(OSError):  # good to have, no more
            for name in (SETTINGS, LOG):
                shutil.copyfile(folder / name, made / name)
        return made
    return None


def save_whole(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save every weight, config and tokenizer to the new folder `folder`: a model folder.

    Raises OutputError where that cannot be done; nothing is left behind then.
    """
    saved: Any = model
    try:
        with quiet():
            saved.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
        for path in folder.iterdir():
            sync(path)
        sync(folder)
    except Exception as error:  # a full disk is an OSError, a SafetensorError, or what tokenizers calls Exception
        delete(folder)
        raise OutputError(f"{folder}: the model cannot be saved ({_reason(error)})") from error
