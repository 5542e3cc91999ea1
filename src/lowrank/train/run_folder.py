"""The folder of a run: claimed before the work, filled while it goes on, complete when it ends.

train.yaml     every setting, as it was resolved; `lowrank train --config` reads it
log.jsonl      one record a line: steps and evaluations
run.json       how rows were made into tokens, and what came out
adapter_*      the adapter, in PEFT's format (or a whole model, with full)
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.checkpoint.atomic import sync, write_file
from lowrank.data import recipe
from lowrank.errors import CheckpointError, ConfigError
from lowrank.train.models import quiet

SETTINGS = "train.yaml"
LOG = "log.jsonl"
OWN = (SETTINGS, LOG, recipe.FILE)


def check_free(out: str) -> Path:
    """The folder to make. Raises ConfigError where there is something already."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {out}: this is a file; give a folder that does not exist yet")
    if folder.is_dir() and (inside := sorted(path.name for path in folder.iterdir())):
        raise ConfigError(
            f"--out {out}: this folder already holds {', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}; "
            "give another one, or remove it first"
        )
    return folder


def claim(folder: Path, settings: Mapping[str, object]) -> None:
    """Make the folder and write the settings down. Raises CheckpointError where that cannot be done."""
    import yaml

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / SETTINGS, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).encode())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write here ({error.strerror or error})") from None


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Write run.json."""
    write_file(folder / recipe.FILE, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def save_whole(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save every weight, config and tokenizer: a model folder. The weights appear last.

    Raises CheckpointError where that cannot be done; nothing is left behind then.
    """
    beside = folder / f".model.{os.getpid()}.tmp"
    saved: Any = model
    try:
        with quiet():
            saved.save_pretrained(str(beside))
            tokenizer.save_pretrained(str(beside))
        for path in sorted(beside.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            sync(path)
            os.replace(path, folder / path.name)
        sync(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: the model cannot be saved ({error.strerror or error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
