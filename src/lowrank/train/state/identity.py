"""What a run is made of, as digests: the base's files, the tokenizer, the rows and their tokens.

A base is not read whole for it. Of every tensor, the entry in the header counts and 4 KiB at its start and in its
middle: a training changes nearly all numbers. Tokens count by a thousand rows spread over the data, whose files count
by every byte.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lowrank.data.sources import TRAIN, files_of
from lowrank.data.tokens import Example
from lowrank.errors import CheckpointError
from lowrank.files.regular import opened
from lowrank.files.safetensors import read_layout
from lowrank.train.settings import TrainSettings

SAMPLE = 4096  # bytes
ROWS = 1000
WHOLE = 2**20  # bytes of a file that counts as it is


def made_of(base: Path, settings: TrainSettings, tokenizer: Any, examples: Sequence[Example]) -> dict[str, str]:
    """{what it is: its digest} of all that a run's numbers come from, beside its settings."""
    return {
        "the base model": of_base(base),
        "the tokenizer": of_tokenizer(tokenizer),
        "the data": of_files(files_of(settings.data, (TRAIN,))),
        "what the rows become as tokens": of_tokens(examples),
    }


def of_base(folder: Path) -> str:
    """Of the weights and the config in a model's folder."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name.endswith((".safetensors", ".bin")) or path.name == "config.json":
            found.update(path.name.encode())
            for start, length in _samples(path):
                found.update(_bytes(path, start, length))
    return found.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """Of its inner tables where it says them, else of its class and size."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    text = inner.to_str() if inner is not None else f"{type(tokenizer).__name__} of {len(tokenizer)}"
    return hashlib.sha256(text.encode()).hexdigest()


def of_files(files: Iterable[Path]) -> str:
    """Of the bytes of all, in order, whatever they are called; of a pipe nothing can be said."""
    found = hashlib.sha256()
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def of_tokens(examples: Sequence[Example]) -> str:
    """Of how many rows there are, and a thousand of them."""
    count = len(examples)
    found = hashlib.sha256(str(count).encode())
    for place in range(0, count, max(1, count // ROWS)):
        row = examples[place]
        parts = [list(row.ids), list(row.labels), None if row.type_ids is None else list(row.type_ids)]
        found.update(json.dumps([*parts, list(row.starts)]).encode())
    return found.hexdigest()


def _samples(path: Path) -> list[tuple[int, int]]:
    """(start, length) of the parts of a file that count."""
    size = path.stat().st_size
    if size <= WHOLE:
        return [(0, size)]
    try:
        layout = read_layout(path)
    except CheckpointError:  # another format
        return [(0, SAMPLE), *((start, SAMPLE) for start in range(SAMPLE, size, max(SAMPLE, size // 1024)))]
    spots = [(entry.offset + at, entry.nbytes) for entry in layout.entries for at in (0, entry.nbytes // 2)]
    return [(0, len(layout.header)), *((start, min(SAMPLE, length)) for start, length in spots)]


def _bytes(path: Path, start: int, length: int) -> bytes:
    with opened(path) as (descriptor, _):
        return os.pread(descriptor, length, start)
