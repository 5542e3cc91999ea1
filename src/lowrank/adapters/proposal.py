"""From spectra to a rank for every module, under a budget of parameters, and to the patterns that say so."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowrank.adapters.each_module import Progress, for_each, one_core_each, silent
from lowrank.checkpoint.adapter_folder import AdapterPath, content_of
from lowrank.checkpoint.describe import Ranks, describe
from lowrank.checkpoint.each_expert import read_each_expert
from lowrank.checkpoint.target import Target
from lowrank.core.allotment import allot
from lowrank.core.spectrum import singular_values
from lowrank.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """What a rank can be chosen by. squares: σ² of the module's matrix, descending, as many as ranks may be given.

    path; shape: (d, k); cost: numbers one rank takes; total: ‖·‖²_F, of which `squares` may be a part; scale: s of its
    adapter; given: the rank it has, 0 before training; exact: the figures are computed, not estimated; experts: how
    many matrices of that shape share the rank, 0 where it is no stack of them; stack: that which a single expert is in.
    """

    path: str
    shape: tuple[int, int]
    cost: int
    squares: tuple[float, ...]
    total: float
    scale: float
    given: int = 0
    exact: bool = True
    experts: int = 0
    stack: str | None = None

    def rank_for(self, share: float) -> int | None:
        """The smallest rank that holds this share of the energy, 1 for a matrix of zeros; None beyond `squares`."""
        held = 0.0
        for n, square in enumerate(self.squares, 1):
            held += square
            if held >= share * self.total * (1 - 1e-12):
                return n
        return None

    def held_by(self, rank: int) -> float:
        """σ_1² + ... + σ_rank²."""
        return sum(self.squares[:rank])


@dataclass(frozen=True, slots=True)
class Proposal:
    """A rank for every module. modules, ranks: in the same order; energy: the share that was asked for.

    budget: numbers that were to be given out, None where `energy` chose; uniform: the highest rank that all modules
    could have for the same numbers, 0 where there is none.
    """

    modules: tuple[ModuleSpectrum, ...]
    ranks: tuple[int, ...]
    energy: float
    budget: int | None
    uniform: int

    @property
    def parameters(self) -> int:
        """Numbers in all A and B at the proposed ranks."""
        return sum(module.cost * rank for module, rank in zip(self.modules, self.ranks, strict=True))

    @property
    def held(self) -> float:
        """The share of all modules' energy that the proposed ranks hold."""
        return self._share(self.ranks)

    @property
    def held_uniform(self) -> float:
        """The same at the uniform rank."""
        return self._share([self.uniform] * len(self.modules))

    def _share(self, ranks: Sequence[int]) -> float:
        total = sum(module.total for module in self.modules)
        held = sum(module.held_by(rank) for module, rank in zip(self.modules, ranks, strict=True))
        return min(1.0, held / total) if total > 0 else 1.0

    def config(self, rslora: bool = False) -> Ranks:
        """r, lora_alpha and the patterns that give every module its rank and leave its scale s as it is."""
        chosen = zip(self.modules, self.ranks, strict=True)
        return describe({module.path: (rank, module.scale) for module, rank in chosen}, rslora)


def propose(
    modules: Sequence[ModuleSpectrum], *, energy: float = 0.9, budget: int | None = None, rank: int | None = None
) -> Proposal:
    """A rank for every module of at least one.

    budget: numbers in all A and B, given out where the next rank adds most σ² for its cost; rank: the budget that this
    uniform rank takes. With neither, every module gets the smallest rank that holds the share `energy` of its own.

    Raises ConfigError for a budget below rank 1, and where there is nothing to measure: no module, or only zeros.
    """
    if not any(module.total > 0 for module in modules):
        raise ConfigError("every matrix is zero, so no rank can be told from another; is there anything to learn?")
    if rank is not None:
        budget = sum(module.cost * min(rank, min(module.shape)) for module in modules)
    if budget is None:
        ranks = [module.rank_for(energy) or len(module.squares) for module in modules]
    else:
        ranks = _bought(modules, budget)
    spent = sum(module.cost * chosen for module, chosen in zip(modules, ranks, strict=True))
    each = sum(module.cost for module in modules)
    return Proposal(tuple(modules), tuple(ranks), energy, budget, max(spent, budget or 0) // each)


def _bought(modules: Sequence[ModuleSpectrum], budget: int) -> list[int]:
    try:
        return allot([module.squares for module in modules], [module.cost for module in modules], budget)
    except ValueError:
        least = sum(module.cost for module in modules)
        raise ConfigError(
            f"--budget {budget:,} is too small: rank 1 of these {len(modules)} modules takes {least:,} numbers; "
            "give more, or fewer --targets"
        ) from None


@one_core_each()
def adapter_spectra(
    adapter: AdapterPath, *, allow_pickle: bool = False, progress: Progress = silent
) -> list[ModuleSpectrum]:
    """The exact spectra of an adapter's ΔW = s·B·A, from its files, every expert a module of its own.

    Raises CheckpointError for damaged files.
    """
    content = content_of(read_each_expert(adapter, allow_pickle))
    targets, stacks = content.targets, content.singles
    return for_each(list(targets), lambda path: _spectrum(path, targets[path], stacks.get(path)), progress)


def _spectrum(path: str, target: Target, stack: str | None) -> ModuleSpectrum:
    squares = singular_values(target.a, target.b, target.scale).square()
    return ModuleSpectrum(
        path=path,
        shape=target.shape,
        cost=sum(target.shape),
        squares=tuple(squares.tolist()),
        total=float(torch.sum(squares)),
        scale=target.scale,
        given=target.a.shape[0],
        stack=stack,
    )
