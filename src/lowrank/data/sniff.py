"""Which shape every record has, and which column is what."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank.data.readers.record import Record
from lowrank.data.rows import Kind
from lowrank.data.settings import DataSettings
from lowrank.data.shapes import FLAGGED, ROLES, SHAPES, Fields, Shape
from lowrank.data.shapes.labelled import is_fraction
from lowrank.errors import DataError


@dataclass(frozen=True, slots=True)
class Columns:
    """of: {role: column}; named: the roles whose column the user said, which must therefore be used."""

    of: dict[str, str]
    named: frozenset[str]


def columns_of(source: str | Path, present: Sequence[str], settings: DataSettings) -> Columns:
    """What the settings say. Raises DataError for a column that the data does not have."""
    asked = dict(settings.columns) | {
        role: column for role in FLAGGED if (column := getattr(settings, f"{role}_column")) is not None
    }
    for role, column in asked.items():
        if column not in present:
            raise DataError(
                f"{source}: there is no column {column!r} for {flag_of(role)}; it has {', '.join(map(repr, present))}"
            )
    return Columns({role: asked.get(role, role) for role in ROLES}, frozenset(asked))


def flag_of(role: str) -> str:
    """The flag that says which column a role is."""
    return f"--{role.replace('_', '-')}-column" if role in FLAGGED else f"--columns.{role}"


def sniff(records: Sequence[Record], columns: Columns, kind: Kind | None) -> list[Shape]:
    """The shape of every record, all of one kind: looked for in each, since the first may be the exception.

    A record without any shape gets that of the others, whose reader will say what it lacks.
    """
    usual: Shape | None = None
    first_of: dict[Kind, tuple[Record, Shape]] = {}
    found: list[Shape | None] = []
    numbers = kind is None and _hold_fractions(records, columns)
    for record in records:
        shapes = _one_label(_shapes(record, columns, kind), numbers)
        for shape in shapes:
            first_of.setdefault(shape.kind, (record, shape))
        usual = usual or (shapes[0] if shapes else None)
        found.append(shapes[0] if shapes else None)
    if len(first_of) > 1:
        places = ", ".join(f"{record.place} is {shape.label} ({shape.kind})" for record, shape in first_of.values())
        raise DataError(f"rows of different kinds: {places}; keep one kind in a file, or choose with --kind")
    if usual is None:
        usual = _meant(columns.named, kind) or _unknown(records[0])
    return [shape or usual for shape in found]


def _shapes(record: Record, columns: Columns, kind: Kind | None) -> list[Shape]:
    """The shapes this record could have. Columns the user named must be used; a row that prefers holds a
    conversation too, and mere text is what nothing else fits."""
    fields = Fields(record.fields, columns.of)
    found = [
        shape
        for shape in SHAPES
        if kind in (None, shape.kind)
        and columns.named <= set(shape.roles)
        and all(fields.get(role) is not None for role in shape.needed)
        and shape.fits(fields)
    ]
    preferred = [shape for shape in found if shape.kind == "preference"]
    return preferred or [shape for shape in found if shape.kind != "text"] or found


def _meant(named: frozenset[str], kind: Kind | None) -> Shape | None:
    """The shape that was asked for, by its columns or its kind."""
    asked = [shape for shape in SHAPES if named <= set(shape.roles) and kind in (None, shape.kind)]
    return asked[0] if asked and (named or kind) else None


def _unknown(record: Record) -> Shape:
    known = ", ".join(dict.fromkeys(shape.label for shape in SHAPES))
    fields = ", ".join(map(repr, record.fields))
    raise DataError(
        f"{record.place}: none of {known} among its fields ({fields}); say which column is which with --prompt-column "
        "and --completion-column, --text-column and --label-column, or --columns messages=NAME"
    )


def _hold_fractions(records: Sequence[Record], columns: Columns) -> bool:
    """Whether a label of the data can only be a number to predict."""
    return any(is_fraction(record.fields.get(columns.of["label"])) for record in records)


def _one_label(shapes: list[Shape], numbers: bool) -> list[Shape]:
    """A whole number may be the name of a class or a number to predict: which, the other rows say."""
    if not {"classification", "regression"} <= {shape.kind for shape in shapes}:
        return shapes
    return [shape for shape in shapes if shape.kind != ("classification" if numbers else "regression")]
