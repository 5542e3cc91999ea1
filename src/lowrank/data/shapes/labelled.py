"""text + label, and perhaps the second text of a pair: rows to classify."""

from typing import Any

from lowrank.data.rows import RowError
from lowrank.data.shapes.shape import Content, Fields, Shape, shown


def _labelled(fields: Fields) -> Content:
    found = {"text": fields.text("text"), "label": _label(fields)}
    return {**found, "text_pair": fields.text("text_pair")} if fields.get("text_pair") is not None else found


def _label(fields: Fields) -> str:
    value: Any = fields.get("label")
    if value is None:
        raise RowError(f"{fields.name('label')} is missing")
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not isinstance(value, str):
        raise RowError(f"{fields.name('label')} must be a name or a whole number, not {shown(value)}")
    if not str(value).strip():
        raise RowError(f"{fields.name('label')} is empty")
    return str(value).strip()


LABELLED = Shape("classification", ("text", "label"), _labelled, ("text_pair",))
