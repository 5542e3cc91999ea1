"""Records to rows: one file a family of shapes. A new shape is a reader and a line in SHAPES."""

from lowrank.data.shapes.alpaca import ALPACA
from lowrank.data.shapes.chats import COMPLETION_CHAT, CONVERSATIONS, MESSAGES
from lowrank.data.shapes.labelled import LABELLED, NUMBERED
from lowrank.data.shapes.preferences import PREFERENCES
from lowrank.data.shapes.shape import Fields, Shape
from lowrank.data.shapes.strings import ANSWER, COMPLETION, TEXT

SHAPES: tuple[Shape, ...] = (
    *(MESSAGES, CONVERSATIONS, COMPLETION_CHAT, COMPLETION, ALPACA, ANSWER),
    *(*PREFERENCES, LABELLED, NUMBERED, TEXT),
)
ROLES: tuple[str, ...] = tuple(dict.fromkeys(role for shape in SHAPES for role in shape.roles))
FLAGGED = ("prompt", "completion", "text", "text_pair", "label")  # roles whose column has a flag of its own

__all__ = ["FLAGGED", "ROLES", "SHAPES", "Fields", "Shape"]
