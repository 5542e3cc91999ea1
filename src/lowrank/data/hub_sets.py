"""Whole data sets of the Hugging Face Hub, through the package `datasets`, as the arrow files of its own cache.

    org/name              the set, at the revision its owner calls main
    org/name@revision     the same at a branch, a tag or a commit
    org/name:config       of a set with several configurations

The rows are what `datasets` makes of the set's files; no code of a set is run. Offline, its cache is asked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank.errors import DataError
from lowrank.hub import HubId, commit_of_set, is_commit
from lowrank.stages import stage


def files_of_set(wanted: HubId, parts: Sequence[str], part_of: dict[str, str]) -> list[Path]:
    """The arrow files of the first of the parts that the set has. part_of: which part the name of a split means.

    Raises DataError where `datasets` is not installed, has not the set and cannot get it, or the set has no such part.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{wanted}: there is no such file here; one file of a data set on the Hub is read as in {wanted.repo}:"
            "train.jsonl, and whole sets by the package datasets, which is not installed: pip install "
            '"lowrank[datasets]"'
        ) from None
    stage(f"reading {wanted} by datasets")
    with _quiet(datasets):
        try:
            splits: Any = datasets.load_dataset(wanted.repo, wanted.file, revision=wanted.revision)
        except Exception as error:  # it has errors of its own, and passes on those of every reader it calls
            raise DataError(f"{wanted}: there is no such file here, and {_why(error)}") from None
    for part in parts:
        for name, rows in splits.items():
            if part_of.get(name) == part:
                return [_of_commit(Path(file["filename"]), wanted) for file in rows.cache_files]
    raise DataError(f"{wanted}: the data set has no split for {' or '.join(parts)}, only {', '.join(splits)}")


def _of_commit(file: Path, wanted: HubId) -> Path:
    """The file as it was at the commit that is asked for: offline, `datasets` gives the latest that it has."""
    found = commit_of_set(file)
    if wanted.revision is None or not is_commit(wanted.revision) or found in (None, wanted.revision):
        return file
    asked = file.parent.with_name(wanted.revision) / file.name
    if not asked.is_file():
        raise DataError(f"{wanted}: there is no such file here, and the cache of datasets has it at {found} only")
    return asked


def _why(error: Exception) -> str:
    return f"datasets cannot load a set of this name ({' '.join(str(error).split()):.300})"


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """datasets without bars and log lines, as it was afterwards."""
    logging = datasets.utils.logging
    level, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
