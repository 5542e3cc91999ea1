"""A row, whatever its file looked like: fields by meaning, or a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["text", "completion", "chat", "classification", "regression", "preference"]
PER_TOKEN: tuple[Kind, ...] = ("text", "completion", "chat")  # what is minimised is a mean over tokens; else over rows
JUDGES: tuple[Kind, ...] = ("classification", "regression")  # a label a row, and a head that is no language model's


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. fields: what a chat template sees of it; trained: what the row itself says of it, None for nothing."""

    fields: Mapping[str, Any]
    trained: bool | None = None

    @property
    def role(self) -> str:
        """system, developer, user, assistant or tool."""
        return str(self.fields["role"])


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages, and the tools they may call; given: how many of the messages are the prompt of a completion."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    given: int = 0


@dataclass(frozen=True, slots=True)
class Preference:
    """Two conversations that begin alike (their `given` turns), of which one is better."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True, slots=True)
class Row:
    """One checked row: the line it starts at, and its fields by meaning (prompt, completion, text, label...).

    chat: the conversation, where the row is one; rejected: the other one, where `chat` is preferred to it. path: the
    file it stands in, where the data set has several. begins, ends: whether its text does, which may be a part of one.
    """

    line: int
    fields: dict[str, str] = field(default_factory=dict)
    chat: Conversation | None = None
    path: Path | None = None
    rejected: Conversation | None = None
    begins: bool = True
    ends: bool = True


class RowError(Exception):
    """What is wrong with one row, without its place: "field 'prompt' is empty"."""
