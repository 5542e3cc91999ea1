"""What differs between kinds of rows: how the model is loaded, and how rows are padded and scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.data.batches import Batch, collate
from lowrank.data.preference import one_behind_the_other
from lowrank.data.recipe import Recipe
from lowrank.data.rows import JUDGES, PER_TOKEN, Kind
from lowrank.data.tokens import Example
from lowrank.errors import CheckpointError
from lowrank.stages import stage
from lowrank.train.answers import answers
from lowrank.train.attention import attention_options
from lowrank.train.ends import end_tokens
from lowrank.train.evaluation import Measure, Written
from lowrank.train.head import find_head
from lowrank.train.held import load_held, load_held_judge
from lowrank.train.losses import loss_of
from lowrank.train.metrics import FIGURES, Figures, of_classes_with_f1
from lowrank.train.models import (
    as_it_is,
    device_of,
    dtype_of,
    head_modules,
    load_causal,
    load_judge,
    load_tokenizer,
    pad_token,
)
from lowrank.train.padding import sees_padding, unsuspected
from lowrank.train.settings import HeldSettings, MachineSettings
from lowrank.train.sharding import Parts, Whole
from lowrank.train.text_metrics import of_answers


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready for one kind of rows. heads: the modules to train and save in full; fresh: those that start new."""

    model: nn.Module
    tokenizer: Any
    device: torch.device
    pad: int
    heads: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def measure(self, recipe: Recipe, metrics: Sequence[str] = ()) -> Measure:
        """How rows that became tokens like this are scored.

        metrics: by name, what they are scored by beside the usual (`train.text_metrics`).

        Whether the model's head can be run alone, some positions at a time, and whether it needs a mask of what is
        padding, is tried here.
        """

        kind = recipe.kind

        masked = kind in JUDGES or sees_padding(self.model)
        pad = self.pad if masked else unsuspected(self.model)

        def together(examples: Sequence[Example]) -> Batch:
            rows = one_behind_the_other(examples) if kind == "preference" else examples
            return collate(rows, pad, self.device, kind not in JUDGES, masked)

        head = None if kind in JUDGES else find_head(self.model)
        classes = kind == "classification"
        figures = of_classes_with_f1 if classes and metrics else FIGURES[kind]
        written = self._written(recipe, metrics) if metrics and not classes else None
        return Measure(together, loss_of(kind, head, recipe.beta), figures, kind not in PER_TOKEN, written)

    def _written(self, recipe: Recipe, metrics: Sequence[str]) -> Written:
        ends = end_tokens(self.model, self.tokenizer, recipe)

        def written(model: nn.Module, examples: Sequence[Example], batch_size: int) -> Figures:
            return of_answers(answers(model, self.tokenizer, self.pad, ends, examples, batch_size), metrics)

        return written


def load(
    folder: Path,
    kind: Kind,
    labels: Sequence[str],
    settings: MachineSettings,
    skip: Sequence[str] = (),
    whole: Whole | None = None,
) -> Loaded:
    """The model and tokenizer of a folder, on the device and in the dtype asked for, quantised where that is asked for.

    skip: modules that are not quantised, beside the heads and what starts new. whole: where this process loads its part
    of the base alone, what is to be whole (`train.sharding`).
    """
    device = device_of(settings)
    dtype = dtype_of(settings, device)
    attention = attention_options(settings, device, dtype)
    stage("loading the model")
    tokenizer = load_tokenizer(folder)
    heads: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    loader = as_it_is if whole is None else partial(Parts, device=device, whole=whole)
    held = settings if isinstance(settings, HeldSettings) and settings.quantise is not None else None
    if kind in JUDGES:
        if held is None:
            model, fresh = load_judge(folder, labels, dtype, loader, **attention)
        else:
            model, fresh = load_held_judge(folder, labels, held, dtype, device, skip)
        heads = head_modules(model, fresh)
    elif held is None:
        model = load_causal(folder, dtype, loader, **attention)
    else:
        model = load_held(folder, held, dtype, device, skip)
    pad = pad_token(model, tokenizer)
    _check_vocabulary(folder, model, tokenizer)
    return Loaded(model.to(device), tokenizer, device, pad, heads, fresh)


def _check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    """A tokenizer of another model gives token numbers the embedding lacks, which torch says obscurely."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"model {folder}: its tokenizer knows {len(tokenizer)} tokens and its embedding only {rows}; "
            "they are not of the same model"
        )
