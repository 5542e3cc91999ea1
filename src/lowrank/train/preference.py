"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): the loss of one answer preferred to another.

    −Σ log σ(β·((log p(c) − log p₀(c)) − (log p(r) − log p₀(r))))     over pairs of a chosen and a rejected answer

log p sums over the tokens of an answer. p₀, the reference, is the same model with its adapter switched off: no second
model is held. It goes first, without a graph, so that no activations are kept while it runs.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lowrank.data.batches import Batch
from lowrank.injection.adapters import disabled
from lowrank.injection.state import find_state
from lowrank.train.chunked import log_probabilities
from lowrank.train.head import Head
from lowrank.train.loss import Loss
from lowrank.train.positions import trained_positions

BETA = 0.1  # the paper's, and TRL's


def summed(margins: Tensor) -> Tensor:
    """−Σ log σ(margin) over pairs: (pairs,) → ()."""
    return -logsigmoid(margins).sum()


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """DPO's loss over pairs: the batch holds the rows of the chosen answers, then those of the rejected ones.

    Tallied over pairs: preferred (the chosen answer is; a tie is half of it), margin, chosen_reward, rejected_reward,
    where an answer's reward is β·(log p − log p₀) and the margin the difference of the two.
    """

    beta: float = BETA
    head: Head | None = None
    size: int | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Where the model has no adapter it is its own reference: margins are 0 and the loss is log 2."""
        reference = self._reference(model, batch)
        rewards = self.beta * (self._answers(model, batch) - reference)
        chosen, rejected = rewards.chunk(2)  # (pairs,) each
        margin = chosen - rejected
        with torch.no_grad():
            preferred = (margin > 0).double() + 0.5 * (margin == 0).double()
            tallies = {"preferred": preferred, "margin": margin, "chosen_reward": chosen, "rejected_reward": rejected}
            tallies = {name: values.detach().double().sum() for name, values in tallies.items()}
        return Loss(summed(margin), margin.numel(), tallies)

    def _answers(self, model: nn.Module, batch: Batch) -> Tensor:
        """log p of the answer of every row: (rows,)."""
        at = trained_positions(model, self.head, batch, self.size)
        return at.by_row(log_probabilities(at.logits_of, at.states, at.targets, at.size)).sum(1)

    @torch.no_grad()
    def _reference(self, model: nn.Module, batch: Batch) -> Tensor:
        """log p₀: without the adapter and without anybody's dropout."""
        was_training = model.training
        with ExitStack() as stack:
            if find_state(model) is not None:
                stack.enter_context(disabled(model))
            model.eval()
            try:
                return self._answers(model, batch)
            finally:
                model.train(was_training)
