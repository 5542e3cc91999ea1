"""The loss of every kind of row."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank.data.batches import Batch
from lowrank.data.rows import Kind
from lowrank.train.chunked import summed_loss, wide
from lowrank.train.head import Head
from lowrank.train.loss import Loss, LossOf
from lowrank.train.positions import trained_positions
from lowrank.train.preference import PreferenceLoss


@dataclass(frozen=True, slots=True)
class NextToken:
    """−Σ log p(token | those before it) over the tokens that are trained.

    Tallied: right, the targets that were the likeliest tokens; exact, the rows of which all were; rows.
    head: that of the model, where it is known; size: positions in a chunk, see `trained_positions`.
    """

    head: Head | None = None
    size: int | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Over the rows of a batch, packed ones too: the first token of a row is never trained."""
        at = trained_positions(model, self.head, batch, self.size)
        total, right = summed_loss(at.logits_of, at.states, at.targets, at.size)
        some = at.mask.any(1)
        exact = ((at.by_row(right) == at.mask).all(1) & some).sum()
        return Loss(total, right.numel(), {"right": right.sum(), "exact": exact, "rows": some.sum()})


def class_loss(model: nn.Module, batch: Batch) -> Loss:
    """−Σ log p(label | text) over the rows.

    Tallied: right; confusion, how many rows of class i (down) were called j (across), (classes, classes).
    """
    logits = _answers(model, batch)  # (rows, classes)
    classes, called = logits.shape[-1], logits.detach().argmax(-1)
    confusion = torch.bincount(batch.labels * classes + called, minlength=classes * classes).view(classes, classes)
    total = cross_entropy(wide(logits), batch.labels, reduction="sum")
    return Loss(total, called.numel(), {"right": (called == batch.labels).sum(), "confusion": confusion})


def squared_error(model: nn.Module, batch: Batch) -> Loss:
    """Σ (ŷ − y)² over the rows, y the number a row is labelled with. By row: (ŷ, y), (rows, 2)."""
    said = wide(_answers(model, batch)).squeeze(-1)  # (rows,)
    wanted = batch.labels.to(said.dtype)
    numbers = torch.stack((said.detach(), wanted), 1).double()
    return Loss((said - wanted).square().sum(), wanted.numel(), rows={"numbers": numbers})


def _answers(model: nn.Module, batch: Batch) -> Tensor:
    call: Any = model
    logits: Tensor = call(**batch.inputs).logits
    return logits


LOSSES: dict[Kind, LossOf] = {
    "text": NextToken(),
    "completion": NextToken(),
    "chat": NextToken(),
    "preference": PreferenceLoss(),
    "classification": class_loss,
    "regression": squared_error,
}


def loss_of(kind: Kind, head: Head | None, beta: float | None) -> LossOf:
    """The loss of a kind of row on one model. head: the model's, where running it alone is right."""
    loss = LOSSES[kind]
    if isinstance(loss, PreferenceLoss) and beta is not None:
        loss = replace(loss, beta=beta)
    return replace(loss, head=head) if isinstance(loss, NextToken | PreferenceLoss) else loss
