"""text + label, and perhaps the second text of a pair: rows to classify, or rows whose label is a number to predict.

Whole numbers are names of classes (0, 1, 2), as every set on the Hub has them. Where any label of a data set has a
fraction (3.8), and all are numbers, they are numbers to predict; --kind says it where the labels do not.
"""

import math
import re
import sys
from typing import Any

from lowrank.data.rows import RowError
from lowrank.data.shapes.shape import Content, Fields, Shape, shown

LARGEST = sys.float_info.max  # a whole number may be larger, and no float then
NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
WHOLE = re.compile(r"\s*[-+]?\d+\s*")


def is_number(value: Any) -> bool:
    """Whether a label could be predicted as a number: one that is finite, or text that says one."""
    if isinstance(value, str):
        return NUMBER.fullmatch(value) is not None and math.isfinite(float(value))
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_fraction(value: Any) -> bool:
    """Whether a label can only be a number to predict: 3.8, 1.0 and 1e-3, not 3."""
    return is_number(value) and (isinstance(value, float) or (isinstance(value, str) and not WHOLE.fullmatch(value)))


def _texts(fields: Fields) -> dict[str, str]:
    found = {"text": fields.text("text")}
    return {**found, "text_pair": fields.text("text_pair")} if fields.get("text_pair") is not None else found


def _labelled(fields: Fields) -> Content:
    return {**_texts(fields), "label": _name(_label(fields), fields)}


def _numbered(fields: Fields) -> Content:
    value = _label(fields)
    if not is_number(value):
        raise RowError(f"{fields.name('label')} must be a number, not {shown(value)}")
    return {**_texts(fields), "label": str(value).strip()}


def _label(fields: Fields) -> Any:
    value: Any = fields.get("label")
    if value is None:
        raise RowError(f"{fields.name('label')} is missing")
    return value


def _name(value: Any, fields: Fields) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not isinstance(value, str):
        raise RowError(f"{fields.name('label')} must be a name or a whole number, not {shown(value)}")
    if not str(value).strip():
        raise RowError(f"{fields.name('label')} is empty")
    return str(value).strip()


def _has_number(fields: Fields) -> bool:
    return is_number(fields.get("label"))


LABELLED = Shape("classification", ("text", "label"), _labelled, ("text_pair",))
NUMBERED = Shape("regression", ("text", "label"), _numbered, ("text_pair",), _has_number)
