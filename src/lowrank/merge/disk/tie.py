"""What becomes of an embedding and an output head that the base stores as one tensor.

Both sides changed alike: they stay one tensor. Otherwise each gets its own in the result, and config.json says so: a
model that is told that they are tied would drop one of the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank.core.merging import Change
from lowrank.core.token_rows import TokenRows
from lowrank.errors import MergeError
from lowrank.files.safetensors import FLOATS
from lowrank.merge.disk.adapters import Contribution
from lowrank.modelfiles.base import BaseFiles
from lowrank.modelfiles.tied import EXPLICIT, has_head, head_of, may_be_tied, shares_several

Changed = Mapping[str, tuple[Contribution, ...]]
Replaced = Mapping[str, Tensor]
Rows = Mapping[str, tuple[TokenRows, ...]]


@dataclass(slots=True)
class Ties:
    """heads: {tensor to write beside its embedding: that embedding}; dropped: heads that stay tied and are not written;

    untie: whether config.json must change; notes: for the report.
    """

    heads: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    untie: bool = False
    notes: list[str] = field(default_factory=list)


def settle_ties(base: BaseFiles, changed: Changed, replaced: Replaced, heads: Mapping[str, str], rows: Rows) -> Ties:
    """Decide for every embedding that may share its tensor with a head. heads: heads that adapters name and the base

    does not store, with their embeddings. Raises MergeError where it cannot be known what shares the tensor.
    """
    ties = Ties()
    if not may_be_tied(base.config):
        return ties
    touched = changed.keys() | replaced.keys() | {name for name in rows if name in heads}
    _refuse_unknown(base, changed)
    for embedding in [name for name in base.tensors if name.endswith(".weight")]:
        head = _head_tensor(embedding, heads)
        if head is None or not touched & {embedding, head}:
            continue
        stored = head in base.tensors
        if not stored and head not in heads and not has_head(base.config):
            continue
        if shares_several(base.config):
            raise MergeError(
                f"{embedding} is shared by an encoder, a decoder and a head, and the files do not tell which of them "
                "the adapter changes: load the model and use merge_and_unload"
            )
        agree = head not in rows and _agree(embedding, head, changed, replaced)  # rows of the embedding are the head's
        _settle(ties, embedding, head, stored, agree)
    return ties


def _head_tensor(embedding: str, heads: Mapping[str, str]) -> str | None:
    named = [head for head, table in heads.items() if table == embedding]
    if named:
        return named[0]
    head = head_of(embedding.removesuffix(".weight"))
    return None if head is None else f"{head}.weight"


def _settle(ties: Ties, embedding: str, head: str, stored: bool, agree: bool) -> None:
    if agree:
        if not stored:
            ties.dropped.add(head)
            ties.notes.append(f"{embedding} and {head} change alike and stay one tensor")
        return
    ties.untie = True
    if not stored:
        ties.heads[head] = embedding
        ties.notes.append(f"{head} was one tensor with {embedding}; now each has its own, and config.json says so")


def _refuse_unknown(base: BaseFiles, changed: Changed) -> None:
    """An adapted table of the whole vocabulary that config.json says is shared, and no head that we know of."""
    owners = [owner for owner in (base.config, (base.config or {}).get("text_config")) if isinstance(owner, dict)]
    if not has_head(base.config) or not any(owner.get(EXPLICIT) is True for owner in owners):
        return
    if any(head_of(name.removesuffix(".weight")) for name in base.tensors):
        return
    sizes = [owner["vocab_size"] for owner in owners if "vocab_size" in owner]
    for name, contributions in changed.items():
        if contributions[0].kind == "embedding" and (not sizes or base.tensors[name][1].shape[0] in sizes):
            raise MergeError(
                f"{name} is tied to an output head whose name the files do not tell: load the model and use "
                "merge_and_unload"
            )


def _agree(embedding: str, head: str, changed: Changed, replaced: Replaced) -> bool:
    """True where both tensors come out equal: the same full copy, the same changes."""
    one, other = replaced.get(embedding), replaced.get(head)
    if (one is None) != (other is None):
        return False
    if one is not None and other is not None and not torch.equal(one, other):
        return False
    left, right = changed.get(embedding, ()), changed.get(head, ())
    return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))


def _same(one: Contribution, other: Contribution) -> bool:
    if one.reads_weight or other.reads_weight:
        return False
    a, b = (_dense_free(contribution) for contribution in (one, other))
    return a.scale == b.scale and torch.equal(a.left, b.left) and torch.equal(a.right, b.right)


def _dense_free(contribution: Contribution) -> Change:
    """The change as factors, in float32; no weight is read."""
    return contribution.change((), torch.empty(0, dtype=FLOATS["F32"]))
