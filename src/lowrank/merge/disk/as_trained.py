"""A base of numbers, read as the training held it: each weight quantised again as it was, and what is left of it.

`train --quantise nf4` trains over Q(W0) of a base that its files have as numbers. Merged onto 16bit, ΔW belongs to
Q(W0); what LoftQ's further rounds took off W0 before it was quantised lies beside the adapter, and is taken off here
too. A weight is made when its first rows are read, and forgotten with its last.
"""

import threading
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank.checkpoint.fusions import Turn
from lowrank.checkpoint.loftq_file import Off, read_off, unfit
from lowrank.checkpoint.stored_base import StoredBase
from lowrank.core.init.loftq import moved
from lowrank.core.stored import Stored
from lowrank.core.stored.held_as import can_be_made, held_as
from lowrank.errors import CheckpointError, MergeError
from lowrank.files.safetensors import DTYPE_NAMES, FLOATS
from lowrank.layers.experts import STACKS
from lowrank.layers.stack import kind_of_stack
from lowrank.merge.disk.adapters import Adapter
from lowrank.merge.disk.found import Match
from lowrank.merge.disk.match import distance_of_bases
from lowrank.modelfiles.base import BaseFiles
from lowrank.modelfiles.blocks import whole
from lowrank.modelfiles.experts import StackInFiles, WholeStack, stacks_in_files
from lowrank.modelfiles.model_class import stacks_of_class
from lowrank.modelfiles.names import resolve
from lowrank.modelfiles.one_expert import OneExpert, turned
from lowrank.modelfiles.tensors import Form, Source, StoredEntry

ALMOST = 0.25  # of the base's own distance


def as_trained(base: BaseFiles, adapters: Sequence[Adapter], matches: Sequence[Match]) -> tuple[BaseFiles, list[str]]:
    """(the base with weights as the adapters' training held them, a note that says so); `base` where it is not that.

    Only where all adapters were trained over the same form, one that is made here, and what is made has the numbers
    that they remember. Raises MergeError where the package for it is missing.
    """
    stored = _agreed(adapters)
    if stored is None or any(isinstance(entry, StoredEntry) for _, entry in base.tensors.values()):
        return base, []
    sources = _sources(base, adapters, stored, matches)
    made = replace(base)  # the same files
    made.__dict__["tensors"] = base.tensors | {name: (source.shard, source.entry) for name, source in sources.items()}
    if not sources or not all(_nearer(made, base, *pair) for pair in zip(adapters, matches, strict=True)):
        return base, []
    return made, [f"{len(sources)} weights were quantised again as in the training ({stored.form}), and read as that"]


@dataclass(eq=False)
class MadeAgain:
    """The form of a weight that the files have as numbers: Q(W0), or Q(W0 − B·A) with what LoftQ took off."""

    parts: dict[str, Source]
    stored: StoredBase
    transposed: bool
    off: Off | None
    scheme: str = "quantised again"

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._made: weakref.ref[_Made] | None = None

    def hold(self) -> "_Made":
        """The whole, as stored; made once for all who hold it at a time."""
        with self._lock:
            made = None if self._made is None else self._made()
            if made is None:
                made = _Made(self._make())
                self._made = weakref.ref(made)
            return made

    def _make(self) -> Tensor:
        weight = whole(self.parts["weight"])
        matrix = _held(weight.t() if self.transposed else weight, self.stored, self.off).matrix()
        return matrix.t().contiguous() if self.transposed else matrix

    def rows(self, rows: slice) -> Tensor:
        """Rows of the matrix."""
        return self.hold().matrix[rows]


@dataclass(eq=False)
class _Made:
    matrix: Tensor


def _held(matrix: Tensor, stored: StoredBase, off: Off | None) -> Stored:
    """What a training held of W0 (d, k); off: what LoftQ took off it before. Raises MergeError without bitsandbytes."""
    found = held_as(matrix, stored.quantised, getattr(torch, stored.dtype), stored.block)
    if found is None:
        raise MergeError(
            f"the adapter was trained over {stored.quantised}, which takes bitsandbytes to make again: pip install "
            "'lowrank[quant]', or merge onto original"
        )
    return found if off is None else moved(matrix, found, off)


@dataclass(eq=False)
class ExpertsMadeAgain:
    """The form of a tensor of all experts: the matrices of each as `MadeAgain`; a row of the whole is an expert.

    turn: how the files turn the matrices; transposed: whether the model has W0ᵀ; blocks: how many row blocks a matrix
    of the model was quantised in.
    """

    parts: dict[str, Source]
    stored: StoredBase
    turn: Turn
    transposed: bool
    blocks: int
    scheme: str = "quantised again"

    def rows(self, rows: slice) -> Tensor:
        """Experts, (n', n·m)."""
        source = self.parts["weight"]
        return torch.stack([self._made(OneExpert(source, e, self.turn)) for e in range(rows.start, rows.stop)])

    def _made(self, expert: OneExpert) -> Tensor:
        blocks = [
            _held(block.t(), self.stored, None).matrix().t()
            if self.transposed
            else _held(block, self.stored, None).matrix()
            for block in expert.matrix.chunk(self.blocks)
        ]
        return turned(torch.cat(blocks), self.turn, back=True).flatten()


def _agreed(adapters: Sequence[Adapter]) -> StoredBase | None:
    """The form that all adapters were trained over, where it can be made again; a moved base is one adapter's alone."""
    forms = [adapter.files.companion.stored for adapter in adapters]
    said = {None if form is None else (form.form, form.dtype, form.block) for form in forms}
    first = forms[0]
    if len(said) > 1 or first is None or not can_be_made(first.quantised) or (first.moved and len(forms) > 1):
        return None
    return first


def _sources(
    base: BaseFiles, adapters: Sequence[Adapter], stored: StoredBase, matches: Sequence[Match]
) -> dict[str, Source]:
    """{tensor: the same, quantised again} of all that was quantised in training, adapted or not."""
    off = read_off(adapters[0].folder) if stored.moved else {}
    places = {
        name: (one.path, one.kind == "conv1d-linear")
        for match in matches
        for name, one in match.changed.items()
        if one.kind in ("linear", "conv1d-linear") and one.path not in _said(one.adapter).plain
        if one.stack is None
    }
    conv1d = any(transposed for _, transposed in places.values())  # a family has all of them, or none
    modules = dict.fromkeys(name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight"))
    changed = [one for match in matches for one in match.changed.values() if one.expert or one.stack]
    found = _of_stacks(base, stored, {one.path for one in changed if one.path not in _said(one.adapter).plain})
    for adapter in adapters:
        stacks = {path for path in _said(adapter).rest if _is_stack(path)}
        rest = resolve(
            [p for p in _said(adapter).rest if p not in stacks], modules, lambda _path, _module: True
        ).modules
        places = {f"{module}.weight": (path, conv1d) for path, module in rest.items()} | places
        found |= _of_stacks(base, stored, stacks)
    for name, (path, transposed) in places.items():
        source = Source(*base.tensors[name]) if name in base.tensors else None
        if source is None or source.entry.dtype not in FLOATS or len(source.entry.shape) != 2:
            continue
        if (taken := off.get(path)) is not None:
            shape = source.entry.shape[:: -1 if transposed else 1]
            if (taken[1].shape[0], taken[0].shape[1]) != shape:
                raise CheckpointError(unfit(adapters[0].folder, path))
        found[name] = _made_again(name, source, stored, MadeAgain({"weight": source}, stored, transposed, taken))
    return found


def _is_stack(path: str) -> bool:
    """Whether the path of something quantised is that of a stack of experts, by its name."""
    return path.rpartition(".")[2] in STACKS and path.rpartition(".")[0].rpartition(".")[2] == "experts"


def _of_stacks(base: BaseFiles, stored: StoredBase, paths: Collection[str]) -> dict[str, Source]:
    """{tensor: the same, quantised again} of stacks of experts, which the files have one by one, or whole."""
    known = stacks_in_files(base) if paths else {}
    found: dict[str, Source] = {}
    for path, place in resolve(paths, dict.fromkeys(known), lambda _path, _place: True).modules.items():
        stack = known.get(place)
        if isinstance(stack, StackInFiles):
            for name in (name for part in stack.parts for name in part):
                source = Source(*base.tensors[name])
                found[name] = _made_again(name, source, stored, MadeAgain({"weight": source}, stored, False, None))
        elif isinstance(stack, WholeStack):
            found |= _of_whole(base, stored, path.rpartition(".")[2], stack)
    return found


def _of_whole(base: BaseFiles, stored: StoredBase, leaf: str, stack: WholeStack) -> dict[str, Source]:
    """The same of a stack that the files have whole; the model's class says which way round it is quantised."""
    found: dict[str, Source] = {}
    model = stacks_of_class(base).get(leaf)
    if model is None:
        return found
    transposed = kind_of_stack(model).transposed
    for name in stack.tensors:
        source = Source(*base.tensors[name])
        alike = source.entry.shape == tuple(model.weight.shape)
        turn = "" if stack.turn == "transposed or not" and alike else stack.turn
        blocks = 2 if stack.halves and not transposed else 1
        form = ExpertsMadeAgain({"weight": source}, stored, turn, transposed, blocks)
        found[name] = _made_again(name, source, stored, form)
    return found


def _made_again(name: str, source: Source, stored: StoredBase, form: Form) -> Source:
    dtype = DTYPE_NAMES[getattr(torch, stored.dtype)]
    return Source(source.shard, StoredEntry(name, dtype, source.entry.shape, source.entry.offset, form))


def _said(adapter: Adapter) -> StoredBase:
    stored = adapter.files.companion.stored
    assert stored is not None
    return stored


def _nearer(made: BaseFiles, base: BaseFiles, adapter: Adapter, match: Match) -> bool:
    """Whether what was made has the numbers that the adapter remembers, but for some that a GPU rounds otherwise."""
    now, before = (distance_of_bases(files, adapter, match) for files in (made, base))
    return now is not None and (before is None or now <= before * ALMOST)
