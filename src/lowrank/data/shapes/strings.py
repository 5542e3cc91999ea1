"""Rows of plain strings: text, prompt + completion, question + answer."""

from lowrank.data.shapes.shape import Content, Fields, Shape


def _text(fields: Fields) -> Content:
    return {"text": fields.text("text")}


def _completion(fields: Fields) -> Content:
    return {"prompt": fields.text("prompt"), "completion": fields.text("completion")}


def _answer(fields: Fields) -> Content:
    return {"prompt": fields.text("question"), "completion": fields.text("answer")}


def _unlabelled(fields: Fields) -> bool:
    """A text with a label is no mere text."""
    return fields.get("label") is None


def _strings(fields: Fields) -> bool:
    return not isinstance(fields.get("prompt"), list) and not isinstance(fields.get("completion"), list)


TEXT = Shape("text", ("text",), _text, fits=_unlabelled)
COMPLETION = Shape("completion", ("prompt", "completion"), _completion, fits=_strings)
ANSWER = Shape("completion", ("question", "answer"), _answer)
