"""chosen + rejected: one answer that is preferred to another, with a prompt, with turns before it, or with neither.

prompt, chosen, rejected            strings, or lists of messages, or a prompt of messages and answers that are one
chosen, rejected                    whole texts or whole conversations: what both begin with is the prompt
conversations, chosen, rejected     sharegpt: the turns before, and the two answers as a turn each
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from lowrank.data.rows import Conversation, Message, Preference, RowError
from lowrank.data.shapes.chats import as_turns, with_system
from lowrank.data.shapes.shape import Content, Fields, Shape
from lowrank.data.shapes.tools import read_tools
from lowrank.data.shapes.turns import check_order

ANSWERS = ("chosen", "rejected")


def _strings(fields: Fields) -> bool:
    return all(not isinstance(fields.get(role), list | dict) for role in ("prompt", *ANSWERS))


def _turns(fields: Fields) -> bool:
    return not _strings(fields)


def _prompted_strings(fields: Fields) -> Content:
    return _differ({"prompt": fields.text("prompt"), **_answers(fields)})


def _whole_strings(fields: Fields) -> Content:
    return _differ(_answers(fields))


def _answers(fields: Fields) -> dict[str, str]:
    return {role: fields.text(role) for role in ANSWERS}


def _differ(found: dict[str, str]) -> dict[str, str]:
    if found["chosen"] == found["rejected"]:
        raise RowError("chosen and rejected are the same answer, so neither is preferred")
    return found


def _prompted(fields: Fields) -> Content:
    return _preference(fields, as_turns(fields, "prompt", "user"))


def _sharegpt(fields: Fields) -> Content:
    return _preference(fields, with_system(fields, as_turns(fields, "conversations")))


def _whole(fields: Fields) -> Content:
    return _preference(fields, ())


def _preference(fields: Fields, prompt: Sequence[Message]) -> Preference:
    """Both conversations. What their answers begin with alike belongs to the prompt too."""
    chosen, rejected = (_after(prompt, as_turns(fields, role, "assistant")) for role in ANSWERS)
    if chosen == rejected:
        raise RowError("chosen and rejected are the same answer, so neither is preferred")
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    return Preference(_conversation(fields, chosen, alike), _conversation(fields, rejected, alike))


def _after(prompt: Sequence[Message], answer: Sequence[Message]) -> tuple[Message, ...]:
    """The turns of one side. Exports that give the prompt beside whole conversations say it twice: once is enough."""
    return (*prompt, *answer) if answer[0].role == "assistant" else tuple(answer)


def _conversation(fields: Fields, turns: tuple[Message, ...], given: int) -> Conversation:
    check_order(turns)
    if all(message.role != "assistant" for message in turns[given:]):
        raise RowError("chosen and rejected must each end in an answer of the assistant's")
    return Conversation(turns, read_tools(fields.get("tools"), fields.name("tools")), given)


def _one_text(fields: Fields) -> bool:
    return _strings(fields) and fields.get("prompt") is None and fields.get("conversations") is None


def _one_conversation(fields: Fields) -> bool:
    return _turns(fields) and fields.get("prompt") is None and fields.get("conversations") is None


def _before(fields: Fields) -> bool:
    """Turns before the answers, which may be strings."""
    return isinstance(fields.get("conversations"), list)


def shape(needed: tuple[str, ...], read: Any, optional: tuple[str, ...], fits: Any) -> Shape:
    """Of rows that prefer."""
    return Shape("preference", needed, read, optional, fits)


PREFERENCES: tuple[Shape, ...] = (
    shape(("prompt", *ANSWERS), _prompted_strings, (), _strings),
    shape(("prompt", *ANSWERS), _prompted, ("tools",), _turns),
    shape(("conversations", *ANSWERS), _sharegpt, ("system", "tools"), _before),
    shape(ANSWERS, _whole_strings, (), _one_text),
    shape(ANSWERS, _whole, ("tools",), _one_conversation),
)
