"""One micro-batch of a training, forward, loss and backward, on a model without numbers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, short
from lowrank.kernels.rehearsal import rehearsing
from lowrank.study.estimate.attention import in_pieces
from lowrank.study.estimate.counting import Counting
from lowrank.study.estimate.machines import Rates
from lowrank.train.chunked import Logits, chunk_size, summed_loss
from lowrank.train.head import Head, with_backbone


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """Bytes beside the weights. kept: what the backbone leaves for the backward pass; height: the most at once.

    logits: what the head and the loss have beyond `kept` at their most; height_in: "forward", "loss" or "backward";
    seconds: what it would take by the rates it was counted with.
    """

    kept: int
    logits: int
    height: int
    height_in: str
    seconds: float


def rehearse(model: nn.Module, rows: int, length: int, again: bool, rates: Rates, on: str) -> Rehearsed:
    """`rows` rows of `length` tokens, all trained. again: with the gradients of an earlier micro-batch standing;
    on: "cpu" or "gpu".

    The model, on the meta device, is left without gradients. Raises ConfigError for one that cannot be called so.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if again else None
    standing = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
    counting = Counting(standing, rates)
    try:
        with Counting((), rates):
            head = _head(model)
        with rehearsing(), counting, in_pieces(counting, on):
            kept = _step(head, rows, length, counting)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be called without weights, so nothing can be estimated of it "
            f"({short(' '.join(str(error).split()), 200)})"
        ) from error
    for parameter in trained:
        parameter.grad = None
    most = counting.in_phase
    height_in = max(most, key=lambda phase: most[phase])
    return Rehearsed(kept, most["loss"] - kept, counting.height, height_in, counting.seconds)


def _step(head: Head, rows: int, length: int, counting: Counting) -> int:
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    counting.phase = "forward"
    hidden = head.hidden(inputs)
    states = hidden.states[:, :-1].clone(memory_format=torch.contiguous_format)  # as picking the trained ones copies
    kept = counting.live
    counting.phase = "loss"
    total = _loss(head, hidden.logits, states.flatten(0, 1))
    del hidden, states
    counting.phase = "backward"
    torch.autograd.backward(total)
    return kept


def _head(model: nn.Module) -> Head:
    """The head, found by one call of two tokens; whether it runs alone cannot be tried without numbers."""
    whole: Any = model
    if whole.get_output_embeddings() is None:
        raise ValueError("it has no head over a vocabulary")
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with torch.no_grad():
        head, _ = with_backbone(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if head is None:
        raise ValueError("no part of it answers with hidden states")
    return head


def _loss(head: Head, logits_of: Logits, states: Tensor) -> Tensor:
    targets = torch.zeros(states.shape[0], dtype=torch.long, device="meta")
    total, _ = summed_loss(logits_of, states, targets, chunk_size(head.vocabulary))
    return total / states.shape[0]
