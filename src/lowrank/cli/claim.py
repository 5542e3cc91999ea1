"""The file that a flag names for a result, claimed while the command works for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.checkpoint.outputs import Inputs, any_file, claimed, new_file


@contextmanager
def claimed_file(file: Path | None, inputs: Inputs, force: bool) -> Iterator[Path | None]:
    """`checkpoint.outputs.claimed` for a file that may not have been asked for; force: one may be replaced."""
    if file is None:
        yield None
        return
    with claimed(file, inputs, any_file if force else new_file) as place:
        yield place
