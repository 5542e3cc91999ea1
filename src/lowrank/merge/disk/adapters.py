"""The adapters to merge: folders with weights, read without a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank.adapters.weighted import WeightedAdapter, weighted_pairs
from lowrank.checkpoint.adapter_folder import AdapterPath
from lowrank.checkpoint.fusions import Turn
from lowrank.checkpoint.keys import MAGNITUDE
from lowrank.checkpoint.read import AdapterFiles, read_with_stacks
from lowrank.checkpoint.restore import unfold, with_moved_base
from lowrank.core.factors import LoraFactors
from lowrank.core.finite import named
from lowrank.core.merging import Change, prepare
from lowrank.errors import MergeError
from lowrank.hub import origin

__all__ = ["Adapter", "Contribution", "WeightedAdapter", "read_adapters"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter and its weight in the sum W0 + Σ weight·ΔW."""

    folder: Path
    files: AdapterFiles
    weight: float

    @property
    def label(self) -> str:
        """What messages and the card call it: its folder's name, no path of this machine."""
        found = origin(self.folder)
        return found.repo if found else self.folder.resolve().name or "adapter"


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Which part of a stack's change a tensor has: that of expert `number` of `count`, of these output rows."""

    number: int
    count: int
    rows: slice


@dataclass(frozen=True, slots=True)
class InStack:
    """How a tensor (E, n, m) holds the stack at a path, or a row block of it.

    rows: of the change's output rows those that each of an expert's matrices has, one matrix after another as merging
    in memory takes them; turn: how an expert's bytes lie against those of the model.
    """

    rows: tuple[slice, ...]
    turn: Turn = ""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One adapter's ΔW in one tensor. kind: the layer kind, which says how the tensor stores W0.

    expert: where the tensor is one expert, or a part of one, of the stack at `path`; stack: where it is all experts.
    """

    adapter: Adapter
    path: str
    kind: str
    expert: ExpertRows | None = None
    stack: InStack | None = None

    @property
    def transposed(self) -> bool:
        """True where the tensor is W0ᵀ, (k, d)."""
        return self.kind in ("conv1d-linear", "embedding")

    @property
    def is_first(self) -> bool:
        """Whether the tensor has the first rows of W0; of a stack, those of its first expert."""
        rows = self.expert.rows if self.expert is not None else self.stack.rows[0] if self.stack is not None else None
        number = 0 if self.expert is None else self.expert.number
        return number == 0 and (rows is None or not rows.start)

    @property
    def reads_weight(self) -> bool:
        """True where ΔW depends on W0 itself: DoRA's row norms, and a start that was taken off the base in training."""
        return MAGNITUDE in self.adapter.files.low_rank[self.path] or self._moved is not None

    @property
    def _moved(self) -> str | None:
        plain = self.kind in ("linear", "conv1d-linear") and self.expert is None and self.stack is None
        return self.adapter.files.config.moved_base if plain else None

    def factors(self, shape: tuple[int, ...], weight: Tensor) -> LoraFactors:
        """The factors as loading the adapter onto a model gives them.

        shape: the tensor's own; weight: (n, m) as stored or, where nothing reads it, anything of its dtype.
        """
        files, one = self.adapter.files, self.expert
        if one is None:
            factors = files.factors(self.path, shape)
        else:
            factors = files.factors_of_expert(self.path, one.number, one.count, one.rows)
        factors = unfold(factors, self.path, files.companion)
        factors = factors.to(dtype=torch.promote_types(factors.a.dtype, weight.dtype))
        if self._moved is None:
            return factors
        with named(self.path):
            return with_moved_base(factors, self._moved, weight.t() if self.transposed else weight)

    def change(self, shape: tuple[int, ...], weight: Tensor) -> Change:
        """ΔW ready to be added to rows of the tensor as stored; arguments as for `factors`."""
        factors = self.factors(shape, weight)
        with named(self.path):
            return prepare(factors, weight, transposed=self.transposed, weighting=self.adapter.weight)


def read_adapters(adapters: WeightedAdapter | Sequence[WeightedAdapter], allow_pickle: bool = False) -> list[Adapter]:
    """Every adapter, checked as far as that goes without a base; a bare path has the weight 1.

    Raises ConfigError for no adapters and a weight that cannot be meant, MergeError for a folder given twice, and
    CheckpointError for files that cannot be read.
    """
    read = [_read(path, weight, allow_pickle) for path, weight in weighted_pairs(adapters, "merge")]
    folders = [adapter.folder.resolve() for adapter in read]
    if twice := {str(folder) for folder in folders if folders.count(folder) > 1}:
        raise MergeError(f"merge: the adapter {', '.join(sorted(twice))} is given twice; give it once, with the sum")
    return read


def _read(path: AdapterPath, weight: float, allow_pickle: bool) -> Adapter:
    files = read_with_stacks(path, allow_pickle)
    adapter = Adapter(files.folder, files, weight)
    if adapter.weight != 1 and adapter.files.config.lora.use_dora:
        raise MergeError(
            f"{path} is a DoRA adapter, whose change is not linear in its factors: it can be merged with weight 1 only"
        )
    return adapter
