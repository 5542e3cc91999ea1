"""One micro-batch of a training, forward, loss and backward, on a model without numbers."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, short
from lowrank.injection.adapters import disabled
from lowrank.injection.state import find_state
from lowrank.kernels.rehearsal import rehearsing
from lowrank.study.estimate.attention import in_pieces
from lowrank.study.estimate.counting import Counting
from lowrank.study.estimate.operation import Done
from lowrank.train.chunked import Logits, chunk_size, log_probabilities, summed_loss
from lowrank.train.head import Head, Hidden, with_backbone
from lowrank.train.preference import summed


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """Bytes beside the weights. kept: what the backbone leaves for the backward pass; heights: the most at once in each
    of "forward", "loss" and "backward"; logits: what the head and the loss have beyond `kept` at their most.

    done: how often each operation was.
    """

    kept: int
    logits: int
    heights: dict[str, int]
    done: Done


def rehearse(model: nn.Module, rows: int, length: int, again: bool, on: str, pairs: bool = False) -> Rehearsed:
    """`rows` rows of `length` tokens, all trained. again: with the gradients of an earlier micro-batch standing;
    on: "cpu" or "gpu"; pairs: a row is a chosen and a rejected answer, two texts.

    The model, on the meta device, is left without gradients. Raises ConfigError for one that cannot be called so.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if again else None
    standing = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
    counting = Counting(standing)
    try:
        with Counting(()):
            head = _head(model)
        with rehearsing("cpu" if on == "cpu" else "cuda"), counting, in_pieces(counting, on):
            kept = _step_of_pairs(head, rows, length, counting) if pairs else _step(head, rows, length, counting)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be called without weights, so nothing can be estimated of it "
            f"({short(' '.join(str(error).split()), 200)})"
        ) from error
    for parameter in trained:
        parameter.grad = None
    return Rehearsed(kept, counting.in_phase["loss"] - kept, counting.in_phase, counting.done)


def _step(head: Head, rows: int, length: int, counting: Counting) -> int:
    counting.phase = "forward"
    hidden, states = _states(head, rows, length)
    kept = counting.live
    counting.phase = "loss"
    total = _loss(head, hidden.logits, states)
    del hidden, states
    counting.phase = "backward"
    torch.autograd.backward(total)
    return kept


def _step_of_pairs(head: Head, pairs: int, length: int, counting: Counting) -> int:
    """DPO's, as `train.preference` takes it: the reference first, without a graph."""
    with torch.no_grad(), disabled(head.model) if find_state(head.model) else nullcontext():
        counting.phase = "forward"
        reference = _answers(head, *_states(head, 2 * pairs, length))
    hidden, states = _states(head, 2 * pairs, length)
    kept = counting.live
    counting.phase = "loss"
    answers = _answers(head, hidden, states)
    del hidden, states
    chosen, rejected = (answers - reference).chunk(2)
    total = summed(chosen - rejected)
    counting.phase = "backward"
    torch.autograd.backward(total)
    return kept


def _states(head: Head, rows: int, length: int) -> tuple[Hidden, Tensor]:
    """(the backbone's answer, the positions of it that are trained): (n, d), copied, as picking them copies."""
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    hidden = head.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    states = hidden.states[:, :-1].clone(memory_format=torch.contiguous_format)
    return hidden, states.flatten(0, 1)


def _answers(head: Head, hidden: Hidden, states: Tensor) -> Tensor:
    """log p of every row: (rows,)."""
    targets = torch.zeros(states.shape[0], dtype=torch.long, device="meta")
    found = log_probabilities(hidden.logits, states, targets, chunk_size(head.vocabulary))
    return found.view(hidden.states.shape[0], -1).sum(1)


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
