"""The feed-forward part of a model's last block, computed at the positions that are read and at no other.

Behind the last attention a position is its own: what the feed-forward part answers elsewhere reaches nothing that is
trained. So it gets the rows of x that are read, one after the other, and answers zeros in the places between. Which
part that is, is tried once on the loaded model (`find_part`), so that no family is known by name.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

LEAST = 1 / 8  # the share of positions not read from which picking rows is worth its copies


def find_part(backbone: nn.Module, states: Callable[[], Tensor], read: Tensor, agree: float) -> str:
    """The path of the part, empty where there is none: the last one that answers and leaves the states as they were.

    states: runs the model for hidden states, (rows, length, d), on a few short rows, of which `read` are compared;
    agree: how far two calls may lie apart, of the largest number.
    """
    return next((path for path in _candidates(backbone) if _is_alone(backbone, path, states, read, agree)), "")


def _candidates(backbone: nn.Module) -> Iterable[str]:
    """The parts of the last block that hold a matrix, the last one first, by path; none under checkpointing.

    A block that is computed again in the backward pass would be computed without what is put around its part here.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()):
        return []
    lists = [(path, m) for path, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return []
    path, blocks = max(lists, key=lambda found: len(found[1]))
    inner = [(name, part) for name, part in blocks[-1].named_children() if any(p.dim() > 1 for p in part.parameters())]
    return [f"{path}.{len(blocks) - 1}.{name}" for name, _ in reversed(inner)]


@contextmanager
def at_read(part: nn.Module, read: Tensor) -> Iterator[None]:
    """Inside, `part` computes the positions where `read`, (rows, length), is true, and answers zero elsewhere."""
    at = read.flatten().nonzero()[:, 0]  # (n,)

    def picked(_part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs  # (rows, length, d)
        return x.flatten(0, 1).index_select(0, at)[None], *rest

    def placed(_part: nn.Module, _inputs: Any, answer: Tensor) -> Tensor:
        whole = answer.new_zeros(read.numel(), answer.shape[-1])
        filled: Tensor = whole.index_copy(0, at, answer[0]).unflatten(0, read.shape)
        return filled

    handles = [part.register_forward_pre_hook(picked), part.register_forward_hook(placed)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_alone(backbone: nn.Module, path: str, states: Callable[[], Tensor], read: Tensor, agree: float) -> bool:
    """Whether the part's own answer is the same with the other positions left out, and what the model makes of it.

    The part's own too: beside a residual stream what a mixer of positions changes may look like rounding.
    """
    part = backbone.get_submodule(path)
    try:
        (whole, after), (alone, found) = _watched(part, states), _watched_at(part, states, read)
    except Exception:  # attention, a part that answers with more than a tensor or takes its input by name
        return False
    return _near(alone[read], whole[read], agree) and _near(found[read], after[read], agree)


def _watched(part: nn.Module, states: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """(the one answer of the part, the states) of a run."""
    answers: list[Tensor] = []
    handle = part.register_forward_hook(lambda _part, _inputs, answer: answers.append(answer))
    try:
        found = states()
    finally:
        handle.remove()
    (answer,) = answers
    return answer, found


def _watched_at(part: nn.Module, states: Callable[[], Tensor], read: Tensor) -> tuple[Tensor, Tensor]:
    with at_read(part, read):
        return _watched(part, states)


def _near(one: Tensor, other: Tensor, agree: float) -> bool:
    return bool((one.double() - other.double()).abs().max() <= agree * other.double().abs().max())  # NaN is not


def where_it_pays(part: nn.Module | None, read: Tensor | None) -> Any:
    """`at_read`, or nothing where no part is known, all is to be computed, or nearly all."""
    if part is None or read is None:
        return nullcontext()
    count = int(read.sum())
    return at_read(part, read) if 0 < count <= (1 - LEAST) * read.numel() else nullcontext()
