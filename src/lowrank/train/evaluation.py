"""Measuring a model on encoded rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.data.batches import Batch, chunks
from lowrank.data.tokens import Example
from lowrank.stages import stage
from lowrank.train.losses import Loss


@dataclass(frozen=True, slots=True)
class Scores:
    """loss: mean −log p per trained token, or per row to classify, over all rows; count: how many those are.

    accuracy: the share of them where the likeliest answer is the right one; matthews: Matthews' correlation of the
    labels with what they were taken for, where rows are classified (GLUE's score for CoLA).
    """

    loss: float
    count: int
    accuracy: float
    matthews: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, slots=True)
class Measure:
    """Everything that turns rows and a model into a loss."""

    collate: Callable[[Sequence[Example]], Batch]
    loss: Callable[[nn.Module, Batch], Loss]


@torch.no_grad()
def score(model: nn.Module, examples: Sequence[Example], measure: Measure, batch_size: int) -> Scores:
    """The scores of `model` on the rows, weighted by what is trained in each; training mode is put back afterwards."""
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    total, right, count = 0.0, 0, 0
    confusion: Tensor | None = None
    try:
        for number, indices in enumerate(chunks(by_length, batch_size)):
            stage("evaluating", number * batch_size, len(examples))
            loss = measure.loss(model, measure.collate([examples[i] for i in indices]))
            total += float(loss.total)
            right += int(loss.right)
            count += loss.count
            if loss.confusion is not None:
                confusion = loss.confusion if confusion is None else confusion + loss.confusion
    finally:
        model.train(was_training)
    return Scores(total / count, count, right / count, None if confusion is None else matthews(confusion))


def matthews(confusion: Tensor) -> float:
    """Matthews' correlation coefficient for any number of classes: 1 all right, 0 no better than chance.

    confusion (classes, classes): true classes down, predicted ones across. (c·n − Σ t·p)/√((n² − Σp²)(n² − Σt²)) with
    the right ones c, all rows n, and per class the true t and predicted p (Gorodkin 2004); 0 where only one class is
    there or predicted.
    """
    table = confusion.double()
    n, right = float(table.sum()), float(table.trace())
    true, predicted = table.sum(1), table.sum(0)
    spread = (n * n - float(predicted.square().sum())) * (n * n - float(true.square().sum()))
    return (right * n - float(true @ predicted)) / math.sqrt(spread) if spread > 0 else 0.0
