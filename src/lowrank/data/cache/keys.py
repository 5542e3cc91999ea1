"""What rows and tokens were made from, as a key: files by their content, settings, the tokenizer, and our own code."""

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lowrank.data.chat.dates import writes_date
from lowrank.data.recipe import Recipe
from lowrank.data.settings import DataSettings

COLUMNS = ("prompt_column", "completion_column", "text_column", "text_pair_column", "label_column", "columns")
OF_ROWS = {"kind", *COLUMNS, "bad_rows", "header"}
DEPENDED_ON = ("transformers", "tokenizers", "jinja2", "pyarrow")


def rows_key(source: str | Path, files: Sequence[Path], settings: DataSettings) -> str:
    """Of the rows that these files hold, read by these settings; empty where one cannot be read twice."""
    if not all(file.is_file() for file in files):
        return ""
    try:
        contents = [(str(file), _content(file)) for file in files]
    except OSError:
        return ""
    said = settings.model_dump(mode="json", include=OF_ROWS)
    return _digest("rows", _code(), str(source), contents, said)


def chosen_key(key: str, indices: Any) -> str:
    """Of some of the rows."""
    import numpy

    if not key:
        return ""
    return _digest("chosen", key, hashlib.sha256(numpy.asarray(indices, dtype="<i8").tobytes()).hexdigest())


def tokens_key(key: str, tokenizer: Any, recipe: Recipe) -> str:
    """Of rows as tokens; empty where the rows have no key, or it cannot be said what the tokenizer is.

    A template whose date could not be fixed for the run makes other tokens tomorrow.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if not key or inner is None:
        return ""
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    own = hashlib.sha256(inner.to_str().encode()).hexdigest()
    day = str(datetime.date.today()) if writes_date(recipe.dated_template) else ""
    return _digest("tokens", key, type(tokenizer).__name__, own, names, recipe.as_json(), day)


@cache
def _code() -> str:
    """The programs that make rows and tokens: ours as it stands, others by their version."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest() + "".join(importlib.metadata.version(name) for name in DEPENDED_ON)


def _content(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]
