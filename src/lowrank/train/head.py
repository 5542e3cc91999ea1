"""What a language model's own forward does after its backbone: hidden states to logits, for any few positions.

Families differ there: soft-capped logits (Gemma), scaled ones (Granite, Cohere, MiniCPM), a cast, a bias, a multiplier
that the backbone holds. None of it is written a second time here. The model's own `forward` is run on a second object
over the same parts whose backbone answers with the hidden states it is handed. Whether that gives the model's logits is
tried once on the loaded model (`find_head`); where it does not, the plain loss is taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.train.last_block import find_part, where_it_pays

# How far logits of two calls may lie apart, of the largest: sums of other lengths are rounded in another order.
AGREE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DEPTH = 2  # the backbone is a part of the model (`model`), or a part of one (`model.decoder`)

Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Head:
    """The head of `model`. path: where the backbone is, the module whose answer it reads; vocabulary: its width.

    last: the path in the backbone of the part that is computed where it is read (`last_block`); empty: there is none.
    """

    model: nn.Module
    path: str
    vocabulary: int = 0
    last: str = ""

    def hidden(self, inputs: Inputs, read: Tensor | None = None) -> "Hidden":
        """The backbone's answer to a batch: one forward of the whole model, in which the head sees one position.

        read: (rows, length), the positions whose states are wanted; all of them where it is not given.
        """
        call: Any = self.model
        backbone = self.model.get_submodule(self.path)
        part = backbone.get_submodule(self.last) if self.last else None
        with _watched(backbone) as answers, where_it_pays(part, read):
            call(**inputs, use_cache=False)
        (answer,) = answers
        return Hidden(self, inputs, answer, answer.last_hidden_state)


@dataclass(frozen=True, slots=True)
class Hidden:
    """states: what the backbone answered, (rows, length, d); answer: that with what came beside it."""

    head: Head
    inputs: Inputs
    answer: Any
    states: Tensor

    def logits(self, states: Tensor) -> Tensor:
        """The model's logits at these positions: (n, d) → (n, vocabulary)."""
        model = self.head.model
        shell = _shell(model, self.head.path, replace(self.answer, last_hidden_state=states[None]))
        answer: Any = type(model).forward(shell, **self.inputs, use_cache=False)
        logits: Tensor = answer.logits[0]
        return logits


class _Answers(nn.Module):
    """Stands where a backbone is: answers at once, and is asked for everything else of the backbone's."""

    def __init__(self, backbone: nn.Module, answer: Any) -> None:
        super().__init__()
        self.behind = (backbone, answer)  # in a tuple it is no submodule

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """What it was made with."""
        return self.behind[1]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.behind[0], name)


def _shell(module: nn.Module, path: str, answer: Any) -> nn.Module:
    """A second object over the parts of `module`, but for the one at `path`. The user's own object is not touched."""
    name, _, rest = path.partition(".")
    inner = module.get_submodule(name)
    part = _shell(inner, rest, answer) if rest else _Answers(inner, answer)
    shell: nn.Module = object.__new__(type(module))
    shell.__dict__.update(module.__dict__, _modules={**module._modules, name: part})
    return shell


@contextmanager
def _watched(backbone: nn.Module) -> Iterator[list[Any]]:
    """Inside, the answers of the backbone are kept, and whoever called it gets their first position alone."""
    answers: list[Any] = []

    def first_position(_module: nn.Module, _inputs: Any, answer: Any) -> Any:
        answers.append(answer)
        return replace(answer, last_hidden_state=answer.last_hidden_state[:, :1])

    handle = backbone.register_forward_hook(first_position)
    try:
        yield answers
    finally:
        handle.remove()


@torch.no_grad()
def find_head(model: nn.Module) -> Head | None:
    """The head of a causal language model; None where running it alone does not give the model's own logits.

    Tried on two rows of a few tokens, one of them padded, without dropout and without a gradient.
    """
    if "forward" in model.__dict__:
        return None  # replaced on the object: its class's forward is not what the model does
    was_training = model.training
    model.eval()
    try:
        return _tried(model)
    except Exception:  # a family that does otherwise may fail in any way; it has the plain loss
        return None
    finally:
        model.train(was_training)


def _tried(model: Any) -> Head | None:
    ids = (torch.arange(12) % model.get_input_embeddings().num_embeddings).view(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    inputs = {name: tensor.to(next(model.parameters()).device) for name, tensor in inputs.items()}
    head, wanted = with_backbone(model, inputs)
    if head is None:
        return None
    hidden, real = head.hidden(inputs), inputs["attention_mask"] == 1
    logits = hidden.logits(hidden.states[real])
    apart = (logits.double() - wanted[real].double()).abs().max()
    known = wanted.shape[1] == ids.shape[1] and bool(wanted.isfinite().all())
    if not (known and apart <= AGREE[logits.dtype] * wanted.abs().max()):
        return None
    backbone, read = model.get_submodule(head.path), real & (inputs["input_ids"] % 2 == 1)

    def states() -> Tensor:
        return head.hidden(inputs).states

    return replace(head, last=find_part(backbone, states, read, AGREE[logits.dtype]))


def with_backbone(model: nn.Module, inputs: Inputs) -> tuple[Head | None, Tensor]:
    """(the head behind what answers with hidden states, the logits), by one call; it is not tried alone."""
    found: list[str] = []
    handles = [module.register_forward_hook(_noting(path, found)) for path, module in _outer_parts(model)]
    call: Any = model
    try:
        logits: Tensor = call(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None, logits
    return Head(model, found[-1], logits.shape[-1]), logits  # a part answers after its own: the last one is outermost


def _outer_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, m) for path, m in model.named_modules() if path and path.count(".") < DEPTH)


def _noting(path: str, found: list[str]) -> Any:
    def note(_module: nn.Module, _inputs: Any, answer: Any) -> None:
        if isinstance(getattr(answer, "last_hidden_state", None), Tensor):
            found.append(path)

    return note
