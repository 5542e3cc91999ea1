"""Measuring a model, with or without an adapter, on a data file."""

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank.checkpoint import load_adapter
from lowrank.data.dataset import read_dataset
from lowrank.data.recipe import Recipe, make_recipe, read_recipe
from lowrank.data.rows import Kind
from lowrank.data.settings import DataSettings
from lowrank.data.sources import TEST, TRAIN, VALID
from lowrank.data.tokens import encode
from lowrank.errors import ConfigError, DataError, Diverged, LowrankWarning
from lowrank.hub import local_folder
from lowrank.train.evaluation import Scores, score
from lowrank.train.loftq import move_base
from lowrank.train.models import find_model, longest_row, own_labels
from lowrank.train.settings import EvalSettings
from lowrank.train.task import load
from lowrank.train.text_metrics import check_metrics


@dataclass(frozen=True, slots=True)
class EvalResult:
    """scores, over `rows` rows of `kind`; cut, dropped: rows shortened, and left out with nothing to score."""

    kind: Kind
    scores: Scores
    rows: int
    cut: int
    dropped: int


def evaluate(settings: EvalSettings) -> EvalResult:
    """The loss on what would be trained in the rows, and the share of right answers.

    Rows become tokens as they did when the adapter was trained (its run.json says how), but for what `settings` says.

    Raises LowrankError for whatever is wrong with the settings, the data, the model or the adapter; Diverged where the
    loss is not finite.
    """
    base = find_model(settings.model)
    adapter = None if settings.adapter is None else local_folder(settings.adapter)
    trained = read_recipe(adapter or base)
    data_settings = _data_settings(settings, trained)
    data = read_dataset(settings.data, data_settings, (TEST, VALID, TRAIN)).spread(settings.rows)
    if trained and data.kind != trained.kind:
        raise DataError(
            f"{data.path}: rows of kind {data.kind}, and {settings.adapter or base} was trained on {trained.kind}; "
            "--kind chooses where rows could be either"
        )
    check_metrics(data.kind, settings.metrics)
    if data.kind == "preference" and adapter is None:
        warnings.warn(
            f"{base} is asked without an adapter, so it is its own reference: every margin is 0 and the loss log 2",
            LowrankWarning,
            stacklevel=2,
        )
    labels = _labels(settings, base, trained) if data.kind == "classification" else ()
    loaded = load(base, data.kind, labels, settings)
    if loaded.fresh and settings.adapter is None:
        raise ConfigError(f"model {base}: it has no trained head for {data.kind} to evaluate; give the --adapter")
    if adapter is not None:
        move_base(loaded.model, base, adapter)
        load_adapter(loaded.model, adapter)
    longest = longest_row(loaded.model, loaded.tokenizer, data_settings.max_length)
    recipe = make_recipe(data_settings, data.kind, loaded.tokenizer, longest, labels, trained, data.speaks)
    recipe = replace(recipe, beta=settings.beta or (trained.beta if trained else None))
    encoded = encode(data, loaded.tokenizer, recipe)
    measure = loaded.measure(recipe, settings.metrics)
    scores = score(loaded.model, encoded.examples, measure, settings.batch_size)
    if not math.isfinite(scores.loss):
        raise Diverged(
            f"the loss of {adapter or base} on {data.path} is {scores.loss}: its answers are not finite, so nothing "
            "can be measured; try --dtype float32, and see what the adapter changes with `lowrank inspect`"
        )
    return EvalResult(data.kind, scores, len(encoded.examples), encoded.cut, encoded.dropped)


def _data_settings(settings: EvalSettings, trained: Recipe | None) -> DataSettings:
    """What the user said, then what holds for the adapter, then the defaults."""
    said = {name: getattr(settings, name) for name in DataSettings.model_fields if name in settings.model_fields_set}
    known: dict[str, Any] = {}
    if trained:
        known = {"template": trained.template, "max_length": trained.max_length}
        known |= {"kind": "regression"} if trained.kind == "regression" else {}  # whole numbers are numbers here
        known |= dict(trained.columns) | {"train_on": trained.train_on, "too_long": trained.too_long}
    return DataSettings.model_validate({**known, **said})


def _labels(settings: EvalSettings, base: Path, trained: Recipe | None) -> tuple[str, ...]:
    if trained:
        return trained.labels
    if known := own_labels(base):
        return known
    raise ConfigError(
        f"the labels of {settings.adapter or base} are not known: it has no run.json, and the model's config does not "
        "name them"
    )
