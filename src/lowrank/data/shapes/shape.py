"""What a shape of row is, and how its reader asks for fields."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.data.rows import Conversation, Kind, Preference, RowError
from lowrank.errors import quoted


class Fields:
    """A record's values by role. columns: {role: column}, as the user mapped them or of the role's own name."""

    def __init__(self, values: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.values = values
        self.columns = columns

    def get(self, role: str) -> Any:
        """The value; None where the row has none."""
        return self.values.get(self.columns[role])

    def name(self, role: str) -> str:
        """The field as a message says it: field 'mr'."""
        return f"field {quoted(self.columns[role])}"

    def text(self, role: str) -> str:
        """The value, which must be text that says something. Raises RowError."""
        value = self.get(role)
        if value is None:
            raise RowError(f"{self.name(role)} is missing")
        if not isinstance(value, str):
            raise RowError(f"{self.name(role)} must be text, not {type(value).__name__} ({shown(value)})")
        if not value.strip():
            raise RowError(f"{self.name(role)} is empty")
        return value

    def optional_text(self, role: str) -> str:
        """The value as text; empty where there is none."""
        value = self.get(role)
        return "" if value is None or value == "" else self.text(role) if str(value).strip() else ""


Content = dict[str, str] | Conversation | Preference


@dataclass(frozen=True, slots=True)
class Shape:
    """One way in which files say a row.

    needed: the roles a row must have, and `optional` those it may have; read: its content, or RowError; fits: which of
    the rows that have the needed ones are of this shape. The name of a role is that of its column, unless mapped.
    """

    kind: Kind
    needed: tuple[str, ...]
    read: Callable[[Fields], Content]
    optional: tuple[str, ...] = ()
    fits: Callable[[Fields], bool] = lambda _fields: True

    @property
    def label(self) -> str:
        """As a message says it: prompt + completion."""
        return " + ".join(self.needed)

    @property
    def roles(self) -> tuple[str, ...]:
        """All fields a row of this shape may use."""
        return (*self.needed, *self.optional)


def shown(value: Any) -> str:
    """A value in a message: its beginning."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
