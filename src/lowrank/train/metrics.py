"""Figures of an evaluation, from what was counted over all its batches."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from lowrank.data.rows import Kind

Counted = Mapping[str, Tensor]  # the tallies and the rows of `Loss`, over all batches
Figures = dict[str, float]


def of_tokens(found: Counted, count: int) -> Figures:
    """accuracy: the share of tokens that were the likeliest; exact_match: of rows of which every trained token was.

    Where one answer of a row is trained, such a row is one that the model, asked greedily, answers word for word.
    """
    return {"accuracy": int(found["right"]) / count, "exact_match": int(found["exact"]) / int(found["rows"])}


def of_classes(found: Counted, count: int) -> Figures:
    """accuracy; Matthews' correlation of the labels with what they were taken for (GLUE's score for CoLA)."""
    return {"accuracy": int(found["right"]) / count, "matthews": matthews(found["confusion"])}


def of_classes_with_f1(found: Counted, count: int) -> Figures:
    """F1 too, macro."""
    return {**of_classes(found, count), "f1": macro_f1(found["confusion"])}


def of_numbers(found: Counted, _count: int) -> Figures:
    """Pearson's and Spearman's correlation of the numbers said with those wanted (GLUE's scores for STS-B)."""
    said, wanted = found["numbers"].double().unbind(1)
    return {"pearson": pearson(said, wanted), "spearman": pearson(ranks(said), ranks(wanted))}


def of_preferences(found: Counted, count: int) -> Figures:
    """accuracy: the share of pairs whose chosen answer is preferred; means of the margin and of both rewards."""
    names = ("margin", "chosen_reward", "rejected_reward")
    return {"accuracy": float(found["preferred"]) / count, **{name: float(found[name]) / count for name in names}}


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


def macro_f1(confusion: Tensor) -> float:
    """The mean over classes of 2·right/(true + predicted); classes that are never either are left out."""
    table = confusion.double()
    said = table.sum(0) + table.sum(1)
    return float((2 * table.diagonal() / said)[said > 0].mean())


def pearson(x: Tensor, y: Tensor) -> float:
    """Σ(x − x̄)(y − ȳ)/√(Σ(x − x̄)²·Σ(y − ȳ)²): x, y (n,); 0 where one of them never changes."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(x.norm() * y.norm())
    return float(x @ y) / spread if spread > 0 else 0.0


def ranks(x: Tensor) -> Tensor:
    """The place of every number among all, from 1; equal ones share the mean of their places: (n,)."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    found: Tensor = (last - (counts - 1) / 2)[which]
    return found


FIGURES: dict[Kind, Callable[[Counted, int], Figures]] = {
    "text": of_tokens,
    "completion": of_tokens,
    "chat": of_tokens,
    "preference": of_preferences,
    "classification": of_classes,
    "regression": of_numbers,
}
