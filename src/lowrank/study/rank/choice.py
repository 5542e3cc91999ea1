"""The ranks that are proposed, where they come from, and what has to be said about them."""

from dataclasses import asdict, dataclass
from typing import Any

from lowrank.adapters.proposal import Proposal, adapter_spectra, propose
from lowrank.study.rank.gradients import Progress, gradient_spectra
from lowrank.study.rank.settings import AdapterRankSettings, GradientRankSettings

# What following the ranks gave: scripts/paper/rank_choice.py, the second table of docs/paper.md.
OF_GRADIENT = (
    "A heuristic: the first gradient is not the change that training will make. Where we tried it on two tasks, its "
    "ranks gave nothing over a uniform rank on one and were slightly worse on the other (docs/paper.md)."
)
OF_CHANGE = (
    "A heuristic: what holds most of ‖ΔW‖² need not matter most. Where we tried it on two tasks, its ranks were as "
    "good as a uniform rank on one and better on the other (docs/paper.md)."
)
OF_STACKS = (
    "The experts of a stack have one rank in training, so they are given one: rank n holds the n strongest directions "
    "of each of them, and costs as much in each."
)
OF_SINGLE_EXPERTS = (
    "Ranks of single experts are for `lowrank resize --ranks`; training gives a stack one rank. Files hold a stack at "
    "the largest rank of its experts, with zeros in the others, and are larger than what is counted here."
)


@dataclass(frozen=True, slots=True)
class Choice:
    """proposal: the ranks; origin: what was measured, in words; notes: what to know of it; config: as settings.

    config: rank, alpha and patterns, with the targets where the proposal chose them, as `lowrank train` takes them.
    """

    proposal: Proposal
    origin: str
    notes: tuple[str, ...]
    config: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Every number."""
        proposal = self.proposal
        modules = [
            {**asdict(module), "rank_for_energy": module.rank_for(proposal.energy), "rank": rank}
            for module, rank in zip(proposal.modules, proposal.ranks, strict=True)
        ]
        return {
            "origin": self.origin,
            "notes": list(self.notes),
            "energy": proposal.energy,
            "budget": proposal.budget,
            "parameters": proposal.parameters,
            "held": proposal.held,
            "uniform_rank": proposal.uniform,
            "held_uniform": proposal.held_uniform,
            "config": self.config,
            "modules": modules,
        }


def from_gradient(settings: GradientRankSettings, progress: Progress = lambda _done, _count: None) -> Choice:
    """Ranks by the spectra of the loss's gradient at W0, under the budget, or that of the uniform rank.

    The first-order fall of the loss that a change of rank r can bring is what its best r directions hold of the
    gradient's energy; the budget is spent where that grows most.

    Raises LowrankError as `gradient_spectra` and `propose` do.
    """
    found = gradient_spectra(settings, progress)
    rank = settings.rank if settings.budget is None else None
    proposal = propose(found.modules, energy=settings.energy, budget=settings.budget, rank=rank)
    notes = [OF_GRADIENT, *found.warnings]
    if found.new_head:
        notes.append("The classification head is new, so this gradient is seen through a head that knows nothing yet.")
    if any(module.experts for module in found.modules):
        notes.append(OF_STACKS)
    if unread := [module.path for module in found.modules if module.total == 0]:
        notes.append(f"No gradient reaches {', '.join(unread)}: rank 1 is the least there is; consider --exclude.")
    targets = {name: settings.model_dump(mode="json")[name] for name in ("targets", "exclude", "layers", "rslora")}
    return Choice(
        proposal,
        f"From the gradient of {found.rows:,} rows ({found.trained:,} trained), before any training.",
        tuple(notes),
        {**{name: value for name, value in targets.items() if value}, **_config(proposal, settings.rslora)},
    )


def from_adapter(settings: AdapterRankSettings, progress: Progress = lambda _done, _count: None) -> Choice:
    """Ranks by the exact spectra of ΔW: under a budget, or the smallest that hold the share `energy` each."""
    modules = adapter_spectra(settings.adapter, allow_pickle=settings.allow_pickle, progress=progress)
    proposal = propose(modules, energy=settings.energy, budget=settings.budget, rank=settings.rank)
    notes = (OF_CHANGE, OF_SINGLE_EXPERTS) if any(module.stack for module in modules) else (OF_CHANGE,)
    return Choice(proposal, f"From ΔW of {settings.adapter}, exact.", notes, _config(proposal, rslora=False))


def _config(proposal: Proposal, rslora: bool) -> dict[str, Any]:
    ranks = proposal.config(rslora)
    return {
        "rank": ranks.r,
        "alpha": ranks.lora_alpha,
        "rank_pattern": ranks.rank_pattern,
        "alpha_pattern": ranks.alpha_pattern,
    }
