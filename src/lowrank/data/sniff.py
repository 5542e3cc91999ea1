"""Which shape every record has, and which column is what."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.data.readers.opening import kind_of
from lowrank.data.readers.record import Record
from lowrank.data.rows import Kind
from lowrank.data.settings import DataSettings
from lowrank.data.shapes import FLAGGED, ROLES, SHAPES, Fields, Shape
from lowrank.data.shapes.labelled import is_fraction
from lowrank.errors import DataError, quoted, some

EITHER = {"classification", "regression"}  # what a row whose label is a whole number may be
NAMINGS = 1000  # sets of names whose shapes are remembered


# what well-known sets call a role; a column of the role's own name always comes first
ALSO = {
    "text": ("sentence", "sentence1", "premise", "question1"),
    "text_pair": ("sentence2", "hypothesis", "question2"),
    "completion": ("response",),
    "output": ("response",),
    "answer": ("response",),
    "input": ("context",),
    "messages": ("conversation", "dialogue", "dialog"),
}
OTHERS = frozenset(name for names in ALSO.values() for name in names)
TABLES = (".csv", ".tsv")
LONGEST_NAME = 40  # of a column: beyond, the first line of a table is rather a row


@dataclass(frozen=True, slots=True)
class Columns:
    """of: {role: column}; named: the roles whose column the user said, which must therefore be used."""

    of: dict[str, str]
    named: frozenset[str]

    def among(self, names: Collection[str]) -> dict[str, str]:
        """{role: column} for a record of these names: what else a role is called, where none has the role's own."""
        if OTHERS.isdisjoint(names):
            return self.of
        return {
            role: column
            if role in self.named or column in names
            else next((name for name in ALSO.get(role, ()) if name in names), column)
            for role, column in self.of.items()
        }


def columns_of(settings: DataSettings) -> Columns:
    """What the settings say; every other role has the column of its name."""
    asked = dict(settings.columns) | {
        role: column for role in FLAGGED if (column := getattr(settings, f"{role}_column")) is not None
    }
    return Columns({role: asked.get(role, role) for role in ROLES}, frozenset(asked))


def check_columns(source: str | Path, columns: Columns, present: Collection[str]) -> None:
    """Raises DataError for a column that was named and that the data does not have."""
    for role, column in columns.of.items():
        if role in columns.named and column not in present:
            raise DataError(
                f"{source}: there is no column {quoted(column)} for {flag_of(role)}; "
                f"it has {some(map(quoted, present), 12)}"
            )


def flag_of(role: str) -> str:
    """The flag that says which column a role is."""
    return f"--{role.replace('_', '-')}-column" if role in FLAGGED else f"--columns.{role}"


@dataclass(slots=True)
class Sniffer:
    """The shape of every record, looked for in each as it comes, since the first may be the exception.

    A whole number as label may be the name of a class or a number to predict: which, the other rows say, so it is known
    at the end. Until then such a row is read as a number, which reads what a name would.
    """

    columns: Columns
    kind: Kind | None
    usual: Shape | None = None  # what most likely was meant by a record without any shape
    numbers: bool = False  # whether a label of the data can only be a number to predict
    _first: dict[tuple[Kind, bool], tuple[str, Shape]] = field(default_factory=dict)  # (kind, whether it is either)
    _met: bool = False  # whether a record had a shape
    _by_names: dict[tuple[str, ...], list[Shape]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.columns.named or self.kind:
            self.usual = next((s for s in SHAPES if self._asked(s)), None)

    def shape(self, record: Record) -> Shape | None:
        """The shape of this record; that of the others where it has none, whose reader will say what it lacks; None
        where it has none and no other one is known."""
        if self.kind is None and not self.numbers:
            self.numbers = is_fraction(record.fields.get(self.columns.of["label"]))
        found = self._shapes(record)
        if not found:
            return self.usual
        either = {shape.kind for shape in found} >= EITHER if len(found) > 1 else False
        for shape in found:
            if (shape.kind, either) not in self._first:
                self._first[shape.kind, either] = (record.place, shape)
        if not self._met:
            self.usual, self._met = found[0], True
        return next(shape for shape in found if shape.kind != "classification") if either else found[0]

    def settled(self) -> Kind | None:
        """The kind of all records, when all were seen; None where none has a shape. Raises DataError for several."""
        kinds: dict[Kind, tuple[str, Shape]] = {}
        for (kind, either), first in self._first.items():
            if not (either and kind == ("classification" if self.numbers else "regression")):
                kinds.setdefault(kind, first)
        if len(kinds) > 1:
            places = ", ".join(f"{place} is {shape.label} ({shape.kind})" for place, shape in kinds.values())
            raise DataError(f"rows of different kinds: {places}; keep one kind in a file, or choose with --kind")
        return next(iter(kinds), self.usual.kind if self.usual else None)

    def _shapes(self, record: Record) -> list[Shape]:
        """The shapes this record could have. Columns the user named must be used; a row that prefers holds a
        conversation too, and mere text is what nothing else fits."""
        names = tuple([name for name, value in record.fields.items() if value is not None])
        if (possible := self._by_names.get(names)) is None:
            has = {role for role, column in self.columns.among(names).items() if column in names}
            possible = [shape for shape in SHAPES if self._asked(shape) and has.issuperset(shape.needed)]
            if len(self._by_names) < NAMINGS:
                self._by_names[names] = possible
        if not possible:
            return []
        fields = Fields(record.fields, self.columns.among(names))
        found = [shape for shape in possible if shape.fits(fields)]
        if len(found) < 2:
            return found
        preferred = [shape for shape in found if shape.kind == "preference"]
        return preferred or [shape for shape in found if shape.kind != "text"] or found

    def _asked(self, shape: Shape) -> bool:
        return self.kind in (None, shape.kind) and self.columns.named <= set(shape.roles)


def refuse_unknown(place: str, fields: Mapping[str, Any]) -> None:
    """Raises DataError: a record of no shape, among records of none."""
    names = some(map(quoted, fields), 12)
    file = place.rpartition(":")[0]
    if kind_of(Path(file)) in TABLES and any(not n or n.isdigit() or len(n) > LONGEST_NAME for n in fields):
        raise DataError(
            f"{file}: its first line ({names:.200}) does not look like names of columns; if it is a row, say "
            "--no-header and the columns by their numbers, as in --text-column 4 --label-column 2"
        )
    known = ", ".join(dict.fromkeys(shape.label for shape in SHAPES))
    raise DataError(
        f"{place}: none of {known} among its fields ({names}); say which column is which with --prompt-column "
        "and --completion-column, --text-column and --label-column, or --columns messages=NAME"
    )
