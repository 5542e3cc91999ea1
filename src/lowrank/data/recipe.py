"""How rows were made into tokens: what eval and generate must repeat exactly, kept beside the adapter as `run.json`."""

import datetime
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank.checkpoint import config_file
from lowrank.checkpoint.adapter_folder import RUN_FILE
from lowrank.data.chat.dates import dated, writes_date
from lowrank.data.chat.template import template_hash, template_text
from lowrank.data.rows import Kind
from lowrank.data.settings import DataSettings
from lowrank.errors import CheckpointError, ConfigError, LowrankWarning
from lowrank.files.json_file import read_object

FILE = RUN_FILE
SETTINGS = config_file.SETTINGS  # what `lowrank train --config` reads
FIELDS = {"kind": str, "template": str, "max_length": int, "labels": list, "columns": dict}
TRAIN_ON: dict[Kind, tuple[str | None, ...]] = {
    "chat": (None, "assistant", "last", "completion", "all"),
    "completion": (None, "completion", "assistant", "last", "all"),
    "text": (None, "all"),
    "classification": (None,),
    "regression": (None,),
    "preference": (None,),
}
LATER = ("train_on", "chat_template", "template_of", "too_long", "date")  # what runs of older versions do not have


@dataclass(frozen=True, slots=True)
class Recipe:
    """kind of row, the text a completion follows, the length rows are cut to, and the labels by their numbers.

    beta: how much a preference weighs against staying near the model without the adapter (DPO's β).
    train_on: what of a conversation is trained, None for the assistant's turns; chat_template: the text of the template
    conversations are written by, empty for other rows; template_of: whose it is, in words; too_long: what is done with
    rows longer than max_length, None for what is usual for their kind; date: the day (YYYY-MM-DD) that a chat template
    writes which writes one, so that training and asking again see the same text.
    columns: the kind and columns chosen for the training file; they hold for a file to evaluate unless others are.
    """

    kind: Kind
    template: str
    max_length: int
    labels: tuple[str, ...] = ()
    columns: tuple[tuple[str, Any], ...] = ()
    train_on: str | None = None
    chat_template: str = ""
    template_of: str = ""
    too_long: str | None = None
    beta: float | None = None
    date: str = ""

    @property
    def dated_template(self) -> str:
        """The chat template, which writes the recipe's date."""
        return dated(self.chat_template, self.date)

    def prompt(self, text: str) -> str:
        """What the model reads before it answers `text`."""
        return self.template.replace("{prompt}", text) if self.kind in ("completion", "preference") else text

    def as_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        found = {**asdict(self), "labels": list(self.labels), "columns": dict(self.columns)}
        return {**found, "chat_template_hash": template_hash(self.chat_template)} if self.chat_template else found


def make_recipe(
    settings: DataSettings,
    kind: Kind,
    tokenizer: Any,
    max_length: int,
    labels: tuple[str, ...],
    trained: "Recipe | None" = None,
    speaks: bool | None = None,
) -> Recipe:
    """How rows of this kind become tokens by these settings. trained: the recipe of an adapter that is asked again.

    speaks: whether the rows are conversations, as the kind says where it is not given.

    Warns where the tokenizer's chat template is no longer the one that the adapter was trained with. Raises ConfigError
    for a choice of what is trained that the kind does not have.
    """
    if settings.train_on not in TRAIN_ON[kind]:
        allowed = ", ".join(name for name in TRAIN_ON[kind] if name)
        raise ConfigError(f"--train-on {settings.train_on}: of rows of kind {kind} one trains {allowed or 'the label'}")
    named = ("kind", *(f"{role}_column" for role in ("prompt", "completion", "text", "text_pair", "label")))
    columns = [(name, value) for name in named if (value := getattr(settings, name)) is not None]
    columns += [("columns", settings.columns)] if settings.columns else []
    speaks = kind == "chat" if speaks is None else speaks
    text, whose = chat_template_of(settings.chat_template, tokenizer, trained) if speaks else ("", "")
    date = date_of(text, settings.chat_date, trained)
    return Recipe(
        kind,
        settings.template,
        max_length,
        labels,
        tuple(columns),
        settings.train_on,
        text,
        whose,
        settings.too_long,
        date=date,
    )


def date_of(chat_template: str, asked: str | None = None, trained: Recipe | None = None) -> str:
    """The day that the template writes: the one asked for, the one trained with, today; empty where it writes none."""
    if not writes_date(chat_template):
        return ""
    return asked or (trained.date if trained else "") or str(datetime.date.today())


def chat_template_of(file: str | None, tokenizer: Any, trained: Recipe | None) -> tuple[str, str]:
    """(the template that conversations are written by, whose it is): the file's, the one trained with, the tokenizer's.

    Warns (LowrankWarning) where the tokenizer's is no longer the one that the adapter was trained with. Raises
    ConfigError for a file that cannot be read.
    """
    found, whose = template_text(tokenizer, file)
    if trained is None or not trained.chat_template or file is not None:
        return found, whose
    if trained.chat_template != found and tokenizer.chat_template:
        warnings.warn(
            f"the tokenizer's chat template ({template_hash(found)}) is not the one the adapter was trained with "
            f"({template_hash(trained.chat_template)}), which is used here; a server would use the other",
            LowrankWarning,
            stacklevel=2,
        )
    return trained.chat_template, trained.template_of


def read_recipe(folder: str | Path) -> Recipe | None:
    """The recipe an adapter was trained with; None for an adapter that lowrank did not train.

    Warns (LowrankWarning) where the folder is a run's and its run.json is gone. Raises CheckpointError for a run.json
    that is damaged.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        holds = {path.name for path in Path(folder).glob("*")}
        if SETTINGS in holds and holds & {config_file.NAME, "config.json"}:  # else it has not come to its end
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
            columns=tuple(found["columns"].items()),
            **{name: found[name] for name in LATER if isinstance(found.get(name), str)},
            beta=found["beta"] if isinstance(found.get("beta"), float) else None,
        )
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{file}: damaged, the recipe of the run cannot be read; delete it to do without"
        ) from None
