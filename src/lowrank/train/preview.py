"""A data set as a training would see it, without loading the model."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from lowrank.data.dataset import read_dataset
from lowrank.data.recipe import make_recipe
from lowrank.data.settings import DataSettings
from lowrank.data.tokens import Encoded, encode
from lowrank.train.models import find_model, load_tokenizer, longest_row
from lowrank.train.recipes import labels_of
from lowrank.train.summary import data_lines


@dataclass(frozen=True, slots=True)
class Preview:
    """The rows as tokens, the tokenizer that made them, and what a training's summary would say of them."""

    encoded: Encoded
    tokenizer: Any
    summary: list[tuple[str, str]]


def preview(model: str, data: str, settings: DataSettings) -> Preview:
    """Read and encode as `lowrank train` would. Raises LowrankError as it would."""
    from transformers import AutoConfig

    base = find_model(model)
    tokenizer = load_tokenizer(base)
    rows = read_dataset(data, settings)
    config = AutoConfig.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
    longest = longest_row(SimpleNamespace(config=config), tokenizer, settings.max_length)
    recipe = make_recipe(settings, rows.kind, tokenizer, longest, labels_of(base, rows), speaks=rows.speaks)
    encoded = encode(rows, tokenizer, recipe)
    return Preview(encoded, tokenizer, data_lines(rows, encoded, recipe))
