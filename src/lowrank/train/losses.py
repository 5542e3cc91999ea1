"""What is minimised, as a sum with its count, so that batches of any size can be put together without bias."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank.data.batches import Batch
from lowrank.data.rows import Kind
from lowrank.data.tokens import IGNORED


@dataclass(frozen=True, slots=True)
class Loss:
    """total: the sum over what is trained, in float32 and differentiable; count: how many that are; right: of those.

    confusion: how many rows of class i (down) were called j (across), (classes, classes); None where tokens are scored.
    """

    total: Tensor
    count: int
    right: Tensor
    confusion: Tensor | None = None


def _scored(logits: Tensor, targets: Tensor) -> Loss:
    """logits: (n, classes), targets: (n,)."""
    logits = logits.float()
    total = cross_entropy(logits, targets, reduction="sum")
    return Loss(total, targets.numel(), (logits.detach().argmax(-1) == targets).sum())


def next_token_loss(model: nn.Module, batch: Batch) -> Loss:
    """−Σ log p(token | those before it) over the tokens that are trained; only their logits become float32."""
    call: Any = model
    logits = call(**batch.inputs, use_cache=False).logits  # (rows, length, vocabulary)
    targets = batch.labels[:, 1:]  # (rows, length - 1)
    trained = targets != IGNORED
    return _scored(logits[:, :-1][trained], targets[trained])


def class_loss(model: nn.Module, batch: Batch) -> Loss:
    """−Σ log p(label | text) over the rows."""
    call: Any = model
    logits = call(**batch.inputs).logits  # (rows, classes)
    classes = logits.shape[-1]
    pairs = batch.labels * classes + logits.detach().argmax(-1)
    confusion = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    return replace(_scored(logits, batch.labels), confusion=confusion)


LOSSES: dict[Kind, Callable[[nn.Module, Batch], Loss]] = {
    "text": next_token_loss,
    "completion": next_token_loss,
    "chat": next_token_loss,
    "classification": class_loss,
}
