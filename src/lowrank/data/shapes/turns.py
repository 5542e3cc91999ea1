"""The turns of a conversation: who speaks, what is said, called and thought, by whatever names an export gives them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank.data.rows import Message, RowError
from lowrank.data.shapes.shape import shown
from lowrank.data.shapes.tools import read_calls
from lowrank.errors import quoted

ROLES = {
    **dict.fromkeys(("system", "instruction"), "system"),
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "function-call"), "call"),
    **dict.fromkeys(
        ("tool", "function", "observation", "function_response", "tool_response", "tool_result", "ipython"), "tool"
    ),
}
KNOWN = "system, developer, user (human), assistant (gpt), tool (observation) or function_call"
SPEAKER, SAID = ("role", "from"), ("content", "value")
THOUGHT = ("reasoning_content", "thinking", "reasoning")


def read_turns(turns: Sequence[Any], column: str) -> tuple[Message, ...]:
    """Every turn. Raises RowError that names the turn, as in field 'messages'[2]."""
    found = []
    for number, turn in enumerate(turns):
        where = f"field {quoted(column)}[{number}]"
        if not isinstance(turn, dict):
            raise RowError(f"{where} must be an object with role and content, not {shown(turn)}")
        role = _role(turn, where)
        if role == "system" and not _first(turn, SAID):
            continue  # exports leave an empty one where there is none
        found.append(Message({"role": "assistant" if role == "call" else role, **READ[role](turn, where)}, _said(turn)))
    if not found:
        raise RowError(f"field {quoted(column)} says nothing")
    return tuple(found)


def check_order(turns: Sequence[Message]) -> None:
    """Raises RowError for what no program could have asked for: a tool's answer that nobody called for, no answer."""
    called = False
    for number, turn in enumerate(turns):
        if turn.role == "tool" and not called:
            raise RowError(f"message {number} is a tool's answer, and no call stands before it")
        called = turn.role == "tool" or bool(turn.fields.get("tool_calls"))
    if all(turn.role != "assistant" for turn in turns):
        raise RowError("the conversation has no assistant turn, so there is nothing to learn to say")


def _first(turn: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _role(turn: Mapping[str, Any], where: str) -> str:
    speaker = _first(turn, SPEAKER)
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"{where} is said by {speaker!r:.40}, which is none of {KNOWN}")
    return role


def _spoken(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """System, developer and user: something must be said."""
    text = _text(turn, where)
    if not text.strip():
        raise RowError(f"{where} is empty")
    return {"content": text, **_named(turn)}


def _answered(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Assistant: words, calls, thoughts; one of them at least."""
    found: dict[str, Any] = {"content": _text(turn, where), **_named(turn)}
    if calls := turn.get("tool_calls") or turn.get("function_call"):
        found["tool_calls"] = read_calls(calls, f"{where}: tool_calls")
    thought = _first(turn, THOUGHT)
    if isinstance(thought, str) and thought:
        found["reasoning_content"] = thought
    elif thought:
        raise RowError(f"{where}: the reasoning must be text, not {shown(thought)}")
    if not found["content"].strip() and not calls:
        raise RowError(f"{where} is an empty answer")
    return found


def _called(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """sharegpt's function_call: the value is the call."""
    return {"content": "", "tool_calls": read_calls(_first(turn, SAID), where)}


def _resulted(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool's answer, which may be empty."""
    named = {"tool_call_id": turn["tool_call_id"]} if turn.get("tool_call_id") is not None else {}
    return {"content": _text(turn, where), **_named(turn), **named}


READ: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "system": _spoken,
    "developer": _spoken,
    "user": _spoken,
    "assistant": _answered,
    "call": _called,
    "tool": _resulted,
}


def _named(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": turn["name"]} if isinstance(turn.get("name"), str) else {}


def _text(turn: Mapping[str, Any], where: str) -> str:
    """What is said; parts of text are put on lines of their own, as servers do for models of text alone."""
    value = _first(turn, SAID)
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise RowError(f"{where}: the content must be text, not {type(value).__name__} ({shown(value)})")
    parts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "no text") if isinstance(part, dict) else type(part).__name__
            raise RowError(f"{where} holds a part of {kind}; only text can be trained")
        parts.append(text)
    return "\n".join(parts)


def _said(turn: Mapping[str, Any]) -> bool | None:
    """ "train": false, or "weight": 0 as OpenAI has it."""
    mark = turn.get("train") if turn.get("train") is not None else turn.get("weight")
    if mark is None:
        return None
    if mark not in (0, 1):
        raise RowError(f"a message's train must be true or false and its weight 0 or 1, not {shown(mark)}")
    return bool(mark)
