"""Prompts to be answered, not learned: texts, and files of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank.data.readers.json_rows import read_jsonl
from lowrank.data.readers.opening import kind_of, open_text
from lowrank.data.readers.record import BadRecord, Record
from lowrank.data.rows import Message, RowError
from lowrank.data.shapes.chats import as_turns
from lowrank.data.shapes.shape import Fields
from lowrank.errors import CheckpointError, DataError, short
from lowrank.files.regular import opened

MOST = 64  # more is no sample
MOST_BYTES = 1 << 24  # of a file of them: more than any model is asked at once
TEXT, ROWS = (".txt", ".text", ".prompts"), (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is said before an answer. place: where it stands, as an error says it."""

    turns: tuple[Message, ...]
    place: str

    @property
    def text(self) -> str:
        """What was said last."""
        return str(self.turns[-1].fields.get("content") or "")


def read_prompts(sources: Sequence[str]) -> list[Prompt]:
    """Each source's: a file of prompts, one a line (jsonl: an object with `prompt` or `messages`), else its own text.

    Answers at the end of a conversation are left out. Raises DataError for a file that cannot be read or is no regular
    one, a line that asks nothing, and for more than 64 prompts.
    """
    found = [prompt for source in sources for prompt in _of(source)]
    if len(found) > MOST:
        raise DataError(f"--sample-prompts: {len(found)} prompts, and at most {MOST} are answered; give fewer")
    return found


def prompt_files(sources: Sequence[str]) -> dict[str, str]:
    """{what it is: where it is} of the sources that are files."""
    return {f"file of prompts {source}": source for source in sources if _is_file(Path(source))}


def _of(source: str) -> Iterator[Prompt]:
    path = Path(source)
    kind = kind_of(path)
    if not _is_file(path) and kind not in (*TEXT, *ROWS):
        yield Prompt((_said(source),), f"--sample-prompts {short(repr(source), 60)}")
        return
    try:
        with opened(path) as (_, size):
            if size > MOST_BYTES:
                raise DataError(
                    f"--sample-prompts {source} has {size:,} bytes, and at most {MOST_BYTES:,} can be meant"
                )
        found = list(_rows(path) if kind in ROWS else _lines(path))
    except CheckpointError as error:  # a pipe that nobody may ever write to, a folder, a device
        raise DataError(f"--sample-prompts: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--sample-prompts {source}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise DataError(f"--sample-prompts {source}: no prompt is in it; write one a line")
    yield from found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text too long for a name
        return False


def _lines(path: Path) -> Iterator[Prompt]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Prompt((_said(line.rstrip("\n")),), f"{path}:{number}")


def _rows(path: Path) -> Iterator[Prompt]:
    for record in read_jsonl(path, True).records:
        if isinstance(record, BadRecord):
            raise DataError(record.says)
        try:
            yield Prompt(_asked(record), record.place)
        except RowError as error:
            raise DataError(f"{record.place}: {error}") from None


def _asked(record: Record) -> tuple[Message, ...]:
    """The turns of a row up to where an answer begins. Raises RowError."""
    role = next((name for name in ("messages", "prompt") if name in record.fields), None)
    if role is None:
        raise RowError("a prompt is an object with `prompt` (a text) or `messages` (turns with role and content)")
    turns = as_turns(Fields(record.fields, {role: role}), role, "user" if role == "prompt" else None)
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RowError("it asks nothing, all of it is said by the assistant")
    return turns


def _said(text: str) -> Message:
    return Message({"role": "user", "content": text})
