"""The loss of tokens from hidden states, some positions at a time: no tensor of all logits is ever there.

At a vocabulary of 151,936 the logits of 2,048 positions take 1.2 GB in float32, and the plain loss holds three such
tensors. Here a chunk's logits live as long as its loss and its gradient need them. Both are computed at once, going
forward: ∂(−log p)/∂logits is softmax − onehot, so nothing has to wait for a backward pass or be computed twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

LEAST, NUMBERS = 256, 2**25  # positions in a chunk; logits in one where more positions fit

Logits = Callable[[Tensor], Tensor]  # (n, d) → (n, vocabulary)


def chunk_size(vocabulary: int) -> int:
    """Positions in a chunk: by shape alone, so the same rows are always cut in the same places."""
    return max(LEAST, NUMBERS // vocabulary)


def wide(logits: Tensor) -> Tensor:
    """As log p is computed: in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def summed_loss(logits_of: Logits, states: Tensor, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(−Σ log p(target), which targets were the likeliest): states (n, d), targets (n,) → (), (n,).

    Differentiable once, in the states and in whatever `logits_of` reaches that requires a gradient.
    """
    work = _Gradients(states)
    total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
    right = []
    for start in range(0, targets.numel(), size):
        part = targets[start : start + size]
        logits = work.logits(logits_of, start, part.numel())  # (c, vocabulary)
        right.append(logits.detach().argmax(-1) == part)
        errors = wide(logits.detach()).log_softmax(-1)
        at = part[:, None]
        total -= errors.gather(1, at).sum()
        if logits.requires_grad:
            errors.exp_().scatter_add_(1, at, errors.new_full(at.shape, -1.0))  # softmax − onehot
            work.add(logits, errors.to(logits.dtype))
    return work.known(total), torch.cat(right) if right else targets.new_zeros(0, dtype=torch.bool)


def log_probabilities(logits_of: Logits, states: Tensor, targets: Tensor, size: int) -> Tensor:
    """log p(target) of every position: states (n, d), targets (n,) → (n,).

    What its gradient will be is not known going forward, so logits are computed again going back.
    """

    def of(part: Tensor, at: Tensor) -> Tensor:
        return wide(logits_of(part)).log_softmax(-1).gather(1, at[:, None])[:, 0]

    starts = range(0, targets.numel(), size)
    parts = [(states[start : start + size], targets[start : start + size]) for start in starts]
    if not torch.is_grad_enabled():
        return torch.cat([of(*part) for part in parts])
    return torch.cat([checkpoint(of, *part, use_reentrant=False) for part in parts])


class _Gradients:
    """The gradients of a sum over chunks, as they come: of the states, and of the leaves that the head reaches."""

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self.wanted = torch.is_grad_enabled()
        self.of_states: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.of_leaves: list[Tensor] = []
        self.part = states

    def logits(self, logits_of: Logits, start: int, count: int) -> Tensor:
        """Of `count` positions; with a graph from a copy of their states on, where gradients are wanted."""
        self.part = self.states.detach()[start : start + count].requires_grad_(
            self.wanted and self.states.requires_grad
        )
        return logits_of(self.part)

    def add(self, logits: Tensor, errors: Tensor) -> None:
        """Go back from the errors of a chunk's logits, and forget its graph."""
        if not self.of_leaves:
            self.leaves = [leaf for leaf in _leaves(logits) if leaf is not self.part]
        to = [self.part] if self.part.requires_grad else []
        found = torch.autograd.grad(logits, [*to, *self.leaves], errors)
        self.of_states += found[: len(to)]
        of_leaves = found[len(to) :]
        if not self.of_leaves:
            self.of_leaves = [wide(new) for new in of_leaves]
        else:
            for summed, new in zip(self.of_leaves, of_leaves, strict=True):
                summed.add_(new)

    def known(self, total: Tensor) -> Tensor:
        """The sum, whose gradients are these."""
        tensors = [self.states, *self.leaves] if self.of_states else self.leaves
        if not tensors:
            return total
        gradients = [torch.cat(self.of_states)] if self.of_states else []
        answer: Tensor = _Known.apply(total, [*gradients, *self.of_leaves], *tensors)  # type: ignore[no-untyped-call]
        return answer


class _Known(Function):
    """A number whose gradients were computed with it."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [tensor.dtype for tensor in tensors]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a loss in chunks are handed out once: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [g.mul_(by).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, *scaled


def _leaves(answer: Tensor) -> list[Tensor]:
    """The tensors that a gradient of `answer` would be added to, in the order of the graph."""
    found: dict[int, Tensor] = {}
    todo: list[Any] = [] if answer.grad_fn is None else [answer.grad_fn]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        new = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(new)
        todo += new
    return list(found.values())
