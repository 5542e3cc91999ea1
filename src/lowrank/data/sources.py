"""What `--data` names: a file, several, a pattern, a folder with train.*, valid.* and test.*, a set on the Hub."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from lowrank.data.hub_sets import files_of_set
from lowrank.data.readers import ENDINGS, is_data
from lowrank.errors import DataError
from lowrank.hub import data_set, local_file

TRAIN, VALID, TEST = "train", "valid", "test"
PARTS = {TRAIN: TRAIN, VALID: VALID, "validation": VALID, "val": VALID, "dev": VALID, TEST: TEST}
# train.jsonl, train-00000-of-00002.parquet, trainset.csv, testset_w_refs.csv; not trainer_state.json
PART = re.compile(rf"({'|'.join(sorted(PARTS, key=len, reverse=True))})(set)?([-_.].*)", re.IGNORECASE)


def files_of(source: str | Path, parts: Sequence[str]) -> list[Path]:
    """The files to read, by name. parts: which of a folder's are meant, the first that it has; files are taken as such.

    Raises DataError for a pattern that no file has, and for a folder without any of the parts.
    """
    if (wanted := data_set(source)) is not None:
        return files_of_set(wanted, parts, PARTS)
    path = local_file(source)
    if path.is_dir():
        return _in_folder(path, parts)
    if path.exists():
        return [path]
    names = [name.strip() for name in str(source).split(",") if name.strip()]
    return [found for name in names for found in _matching(name)] or [path]


def has_part(source: str | Path, part: str) -> bool:
    """Whether `source` is a folder that holds such a part."""
    return Path(source).is_dir() and part in _parts(Path(source))


def _matching(name: str) -> list[Path]:
    if not glob.has_magic(name):
        return [local_file(name)]
    found = sorted(path for path in map(Path, glob.glob(name)) if path.is_file())
    if not found:
        raise DataError(f"{name}: no file has a name like this")
    return found


def _in_folder(folder: Path, parts: Sequence[str]) -> list[Path]:
    found = _parts(folder)
    for part in parts:
        if part in found:
            return found[part]
    inside = sorted(path.name for path in folder.iterdir() if path.is_file() and is_data(path))
    held = (
        f"it holds {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}" if inside else "it holds no data file"
    )
    raise DataError(
        f"{folder}: this folder has no {' or '.join(f'{part}.*' for part in parts)} to read, {held}; "
        f"name the file, one of {ENDINGS}"
    )


def _parts(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = PART.fullmatch(path.name)
        if match and path.is_file() and is_data(path):
            found.setdefault(PARTS[match[1].lower()], []).append(path)
    return found
