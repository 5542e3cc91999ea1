"""Tools and calls of them, as lists or as the JSON strings that tables keep them in."""

import json
from collections.abc import Mapping
from typing import Any

from lowrank.data.rows import RowError
from lowrank.data.shapes.shape import shown


def read_tools(value: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    """The tools a conversation may call, each as OpenAI describes a function; none where the field is empty."""
    if isinstance(value, str):
        value = _json(value, name) if value.strip() else None
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"{name} must be a list of tools, or one as a JSON string, not {shown(value)}")
    _check_values(value, name)
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def read_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """The calls of one assistant turn: {"name", "arguments"}, or OpenAI's {"type", "function": {...}}; one or several.

    Arguments in a JSON string become an object, which is what chat templates print.
    """
    value = _json(value, name) if isinstance(value, str) else value
    return [_call(call, name) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, name: str) -> dict[str, Any]:
    outer = call if isinstance(call, dict) and isinstance(call.get("function"), dict) else {"function": call}
    function = outer["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{name} holds no call of a tool, an object with name and arguments, but {shown(call)}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{name}: arguments") if arguments.strip() else {}
    _check_values(arguments, f"{name}: arguments")
    kept = {key: outer[key] for key in ("id",) if outer.get(key) is not None}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"{name} is not JSON: {shown(text)}") from None


def _check_values(value: Any, name: str) -> None:
    """Raises RowError for bytes of a table, which a template would print as Python does; dates are text to it."""
    try:
        json.dumps(value, default=_text)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{name} must be values of JSON ({str(error)[:80]}), not {shown(value)}") from None


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        raise TypeError("bytes are none")
    return str(value)
