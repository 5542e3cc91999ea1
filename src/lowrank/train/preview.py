"""A data set as a training would see it, without loading the model."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from lowrank.data.dataset import Dataset, read_dataset
from lowrank.data.met import Met, met_in_training
from lowrank.data.recipe import Recipe, make_recipe
from lowrank.data.settings import DataSettings
from lowrank.data.sources import TEST, VALID, has_part
from lowrank.data.tokens import Encoded, encode
from lowrank.train.models import config_of, find_model, load_tokenizer, longest_row
from lowrank.train.recipes import labels_of
from lowrank.train.summary import data_lines


@dataclass(frozen=True, slots=True)
class Preview:
    """The rows as tokens, how and by which tokenizer they became that, what a training's summary would say of them, and
    which rows of each set to evaluate stand among them too."""

    encoded: Encoded
    recipe: Recipe
    tokenizer: Any
    summary: list[tuple[str, str]]
    met: list[Met]


def preview(model: str, data: str, settings: DataSettings, eval_data: str | None = None) -> Preview:
    """Read and encode as `lowrank train` would. Raises LowrankError as it would.

    eval_data: rows to look for among those to train on; where not given, the parts of a folder that are for that.
    """
    base = find_model(model)
    tokenizer = load_tokenizer(base)
    rows = read_dataset(data, settings)
    longest = longest_row(SimpleNamespace(config=config_of(base)), tokenizer, settings.max_length)
    recipe = make_recipe(settings, rows.kind, tokenizer, longest, labels_of(base, rows), speaks=rows.speaks)
    encoded = encode(rows, tokenizer, recipe)
    met = [met_in_training(rows, evaluated) for evaluated in _evaluated(data, settings, eval_data)]
    return Preview(encoded, recipe, tokenizer, data_lines(rows, encoded, recipe), met)


def _evaluated(data: str, settings: DataSettings, eval_data: str | None) -> list[Dataset]:
    if eval_data is not None:
        return [read_dataset(eval_data, settings, (VALID, TEST))]
    return [read_dataset(data, settings, (part,)) for part in (VALID, TEST) if has_part(data, part)]
