"""Measuring a model on encoded rows."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.data.batches import Batch, chunks
from lowrank.data.examples import Example, lengths_of
from lowrank.data.packing import end_to_end
from lowrank.stages import stage
from lowrank.train.lockstep import idle_passes
from lowrank.train.loss import LossOf
from lowrank.train.metrics import Counted, Figures
from lowrank.train.processes import gathered_tensors, share, summed, summed_float


@dataclass(frozen=True, slots=True)
class Scores:
    """loss: the mean over what is trained in all rows (`train.losses` says what it is); count: how many.

    figures: what else the kind of row is scored by, by name (`train.metrics` says what they are), the first one first.
    """

    loss: float
    count: int
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """The share of what is trained where the likeliest answer is the right one; None where numbers are."""
        return self.figures.get("accuracy")

    @property
    def matthews(self) -> float | None:
        """Matthews' correlation of labels with what they were taken for; None where no rows are classified."""
        return self.figures.get("matthews")

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


Written = Callable[[nn.Module, Sequence[Example], int], Figures]


@dataclass(frozen=True, slots=True)
class Measure:
    """Everything that turns rows and a model into a loss, and what is counted beside it into figures.

    written: figures of what the model writes for the rows, in batches of a size; None where nothing is written.
    flat: rows that are trained together lie end to end, so that nothing is padded (`train.packing.flattened`).
    """

    collate: Callable[[Sequence[Example]], Batch]
    loss: LossOf
    figures: Callable[[Counted, int], Figures]
    per_row: bool = False  # what is trained is counted in rows, not in tokens
    written: Written | None = None
    flat: bool = False

    def trained(self, examples: Sequence[Example]) -> Batch:
        """The rows as a batch to train on."""
        return self.collate([end_to_end(examples)] if self.flat else examples)

    def count(self, examples: Sequence[Example]) -> int:
        """How many things are trained in the rows: what their losses are divided by."""
        return len(examples) if self.per_row else sum(example.trained for example in examples)


@torch.no_grad()
def score(model: nn.Module, examples: Sequence[Example], measure: Measure, batch_size: int) -> Scores:
    """The scores of `model` on the rows, weighted by what is trained in each; training mode is put back afterwards.

    Several processes share the rows out, and each gets the scores of all.
    """
    was_training = model.training
    model.eval()
    by_length = lengths_of(examples).argsort(kind="stable").tolist()
    total, count = 0.0, 0
    tallies: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    try:
        for number, indices in share(list(enumerate(chunks(by_length, batch_size)))):
            stage("evaluating", number * batch_size, len(examples))
            loss = measure.loss(model, measure.collate([examples[i] for i in indices]))
            total += float(loss.total)
            count += loss.count
            tallies = {name: tallies[name] + new if tallies else new for name, new in loss.tallies.items()}
            for name, new in loss.rows.items():
                rows.setdefault(name, []).append(new)
        for _ in range(idle_passes(model, math.ceil(len(examples) / batch_size))):
            measure.loss(model, measure.collate([examples[by_length[0]]]))
        written = measure.written(model, examples, batch_size) if measure.written else {}
    finally:
        model.train(was_training)
    per_row = {name: torch.cat(parts) for name, parts in rows.items()}
    total, count = summed_float(total), summed(count)
    counted = _together(gathered_tensors(tallies), sum) | _together(gathered_tensors(per_row), torch.cat)
    scores = Scores(total / count, count)
    tokens = {} if measure.per_row else {"perplexity": min(scores.perplexity, sys.float_info.max)}  # JSON has no inf
    return replace(scores, figures=tokens | measure.figures(counted, count) | written)


def _together(found: Sequence[Mapping[str, Tensor]], how: Callable[[list[Tensor]], Any]) -> dict[str, Tensor]:
    """One of each name from those of several processes, some of which may have had no rows."""
    names = dict.fromkeys(name for part in found for name in part)
    return {name: how([part[name] for part in found if name in part]) for name in names}
