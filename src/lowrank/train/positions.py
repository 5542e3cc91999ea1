"""The positions of a batch that are trained, as they stand before the head; no other one reaches it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lowrank.data.batches import Batch
from lowrank.data.tokens import IGNORED
from lowrank.train.chunked import Logits, chunk_size
from lowrank.train.head import Head


@dataclass(frozen=True, slots=True)
class Positions:
    """states (n, d), which `logits_of` makes logits of, `size` positions at a time; targets (n,): the next tokens.

    mask (rows, length - 1): where they stand, in the order of the batch.
    """

    logits_of: Logits
    states: Tensor
    targets: Tensor
    mask: Tensor
    size: int

    def by_row(self, values: Tensor) -> Tensor:
        """Values of the positions (n,) in their rows, zero elsewhere: (rows, length - 1)."""
        return torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(self.mask, values)


def trained_positions(model: nn.Module, head: Head | None, batch: Batch, size: int | None) -> Positions:
    """One forward of `model`. Where `head` is not its, the model's logits are the states, all of them at once.

    size: positions in a chunk; what follows from the vocabulary where it is not given.
    """
    targets = batch.labels[:, 1:]
    mask = targets != IGNORED
    logits_of: Logits = _themselves
    if head is not None and head.model is model:
        hidden = head.hidden(batch.inputs, pad(mask, (0, 1)))
        states, logits_of, vocabulary = hidden.states, hidden.logits, head.vocabulary
    else:
        call: Any = model
        states = call(**batch.inputs, use_cache=False).logits
        vocabulary = states.shape[-1]
    return Positions(logits_of, states[:, :-1][mask], targets[mask], mask, size or chunk_size(vocabulary))


def _themselves(logits: Tensor) -> Tensor:
    return logits
