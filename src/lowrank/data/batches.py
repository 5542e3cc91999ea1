"""The order of the rows, and rows as padded tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from lowrank.data.tokens import IGNORED, Example

T = TypeVar("T")
WINDOW = 50  # batches sorted by length together: long enough to pad little, short enough to stay shuffled


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right to the longest. labels: (rows, length), or (rows,) for classification.

    inputs: input_ids, perhaps attention_mask and token_type_ids, each (rows, length). Where rows are packed,
    position_ids that restart stand instead of the mask: transformers tells packed rows apart by them, and only where
    there is no mask.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    tokens: int  # without padding


def collate(examples: Sequence[Example], pad: int, device: torch.device, per_token: bool, masked: bool = True) -> Batch:
    """One batch on `device`. What the pad token is does not matter: it is never trained.

    masked: whether the model is told what is padding, which a causal one need not know, since it comes after the row.
    """
    length = max(len(example.ids) for example in examples)
    sizes = [len(example.ids) for example in examples]

    def padded(rows: Sequence[Sequence[float]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows]).to(device)

    inputs = {"input_ids": padded([e.ids for e in examples], pad)}
    if any(len(example.starts) > 1 for example in examples):
        inputs["position_ids"] = torch.tensor([positions(example, length) for example in examples]).to(device)
    elif masked:
        inputs["attention_mask"] = padded([[1] * size for size in sizes], 0)
    types = [example.type_ids for example in examples if example.type_ids is not None]
    if types:
        inputs["token_type_ids"] = padded(types, 0)
    labels = [example.labels for example in examples]
    target = padded(labels, IGNORED) if per_token else torch.tensor([label[0] for label in labels]).to(device)
    return Batch(inputs, target, sum(sizes))


def positions(example: Example, length: int) -> list[int]:
    """Counted from the start of each packed row; what fills up to `length` is a row of its own, which nothing sees."""
    edges = [*example.starts, len(example.ids), length]
    return [at for start, end in pairwise(edges) for at in range(end - start)]


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in groups of `size`; the last may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def epoch_order(
    rows: int, batch_size: int, seed: int, epoch: int, lengths: Sequence[int] | None = None
) -> list[Sequence[int]]:
    """The batches of one pass over the rows: a shuffle that depends on seed and epoch alone, and can be redone.

    lengths: of the rows, where those of like length are to go together.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(rows, generator=generator).tolist()
    if lengths is None:
        return chunks(order, batch_size)
    windows = chunks(order, WINDOW * batch_size)
    batches = [b for w in windows for b in chunks(sorted(w, key=lengths.__getitem__), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def batches_from(
    start: int, rows: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None
) -> Iterator[Sequence[int]]:
    """Batch after batch, epoch after epoch, from the batch number `start` on: no earlier epoch is ordered for it."""
    epoch, done = divmod(start, -(-rows // batch_size))
    while True:
        yield from epoch_order(rows, batch_size, seed, epoch, lengths)[done:]
        epoch, done = epoch + 1, 0
