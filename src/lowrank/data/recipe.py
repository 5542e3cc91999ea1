"""How rows were made into tokens: what eval and generate must repeat exactly, kept beside the adapter as `run.json`."""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank.checkpoint.adapter_folder import RUN_FILE
from lowrank.data.rows import Kind
from lowrank.errors import CheckpointError, LowrankWarning
from lowrank.files.json_file import read_object

FILE = RUN_FILE
SETTINGS = "train.yaml"  # every setting of the run, which `lowrank train --config` reads
FIELDS = {"kind": str, "template": str, "max_length": int, "labels": list, "columns": dict}


@dataclass(frozen=True, slots=True)
class Recipe:
    """kind of row, the text a completion follows, the length rows are cut to, and the labels by their numbers.

    columns: the kind and columns chosen for the training file; they hold for a file to evaluate unless others are.
    """

    kind: Kind
    template: str
    max_length: int
    labels: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()

    def prompt(self, text: str) -> str:
        """What the model reads before it answers `text`."""
        return self.template.replace("{prompt}", text) if self.kind == "completion" else text

    def as_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return {**asdict(self), "labels": list(self.labels), "columns": dict(self.columns)}


def read_recipe(folder: str | Path) -> Recipe | None:
    """The recipe an adapter was trained with; None for an adapter that lowrank did not train.

    Warns (LowrankWarning) where the folder is a run's and its run.json is gone. Raises CheckpointError for a run.json
    that is damaged.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        if (Path(folder) / SETTINGS).is_file():
            warnings.warn(
                f"{folder} was trained by lowrank ({SETTINGS} is there) and has lost its {FILE}, which says how rows "
                "were made into tokens: the defaults hold now; give --template and the columns as they were",
                LowrankWarning,
                stacklevel=2,
            )
        return None
    try:
        found = read_object(file, "delete it to do without")["recipe"]
        if any(not isinstance(found[name], kind) for name, kind in FIELDS.items()):
            raise ValueError
        return Recipe(
            kind=found["kind"],
            template=found["template"],
            max_length=found["max_length"],
            labels=tuple(map(str, found["labels"])),
            columns=tuple((str(name), str(column)) for name, column in found["columns"].items()),
        )
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{file}: damaged, the recipe of the run cannot be read; delete it to do without"
        ) from None
