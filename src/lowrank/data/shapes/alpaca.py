"""instruction + output, as alpaca has them: the input below the instruction, earlier turns as (asked, answered)."""

from collections.abc import Iterator
from typing import Any

from lowrank.data.rows import Conversation, Message, RowError
from lowrank.data.shapes.shape import Content, Fields, Shape, shown


def _conversation(fields: Fields) -> Content:
    asked = "\n\n".join(filter(None, (fields.text("instruction"), fields.optional_text("input"))))
    turns = [*_history(fields), ("user", asked), ("assistant", fields.text("output"))]
    if system := fields.optional_text("system"):
        turns.insert(0, ("system", system))
    return Conversation(tuple(Message({"role": role, "content": text}) for role, text in turns))


def _history(fields: Fields) -> Iterator[tuple[str, str]]:
    history: Any = fields.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError(f"{fields.name('history')} must be a list of [asked, answered], not {shown(pair)}")
        yield from zip(("user", "assistant"), pair, strict=True)


ALPACA = Shape("chat", ("instruction", "output"), _conversation, ("input", "system", "history"))
