"""Conversations: `messages` as OpenAI has them, `conversations` as sharegpt has, a prompt and a completion of turns.

The turns of all three are read by one reader, so exports that mix the habits are read too.
"""

from typing import Any

from lowrank.data.rows import Conversation, Message, RowError
from lowrank.data.shapes.shape import Content, Fields, Shape, shown
from lowrank.data.shapes.tools import read_tools
from lowrank.data.shapes.turns import check_order, read_turns


def _messages(fields: Fields) -> Content:
    return _conversation(fields, as_turns(fields, "messages"))


def _conversations(fields: Fields) -> Content:
    return _conversation(fields, with_system(fields, as_turns(fields, "conversations")))


def _completion(fields: Fields) -> Content:
    prompt, completion = as_turns(fields, "prompt", "user"), as_turns(fields, "completion", "assistant")
    return _conversation(fields, (*prompt, *completion), len(prompt))


def with_system(fields: Fields, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns after what the column `system` says, unless they begin with a system's words themselves."""
    system = fields.optional_text("system")
    if system and turns[0].role not in ("system", "developer"):
        return (Message({"role": "system", "content": system}), *turns)
    return turns


def as_turns(fields: Fields, role: str, speaker: str | None = None) -> tuple[Message, ...]:
    """The turns a field holds. speaker: who says it, where it is a mere string; then a single turn will do too."""
    value: Any = fields.get(role)
    if speaker and isinstance(value, str):
        value = [{"role": speaker, "content": value}]
    if speaker and isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"{fields.name(role)} must be a list of messages, not {type(value).__name__} ({shown(value)})")
    if not value:
        raise RowError(f"{fields.name(role)} is empty")
    return read_turns(value, fields.columns[role])


def _conversation(fields: Fields, turns: tuple[Message, ...], given: int = 0) -> Conversation:
    check_order(turns)
    return Conversation(turns, read_tools(fields.get("tools"), fields.name("tools")), given)


def _lists(fields: Fields) -> bool:
    return isinstance(fields.get("prompt"), list) or isinstance(fields.get("completion"), list)


MESSAGES = Shape("chat", ("messages",), _messages, ("tools",))
CONVERSATIONS = Shape("chat", ("conversations",), _conversations, ("system", "tools"))
COMPLETION_CHAT = Shape("chat", ("prompt", "completion"), _completion, ("tools",), _lists)
