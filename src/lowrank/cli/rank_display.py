"""What `lowrank rank` shows and writes."""

import json
from pathlib import Path

from lowrank.adapters.proposal import ModuleSpectrum, Proposal
from lowrank.checkpoint.atomic import write_file
from lowrank.cli.say import say
from lowrank.cli.table import plain_table
from lowrank.study.rank.choice import Choice


def write(choice: Choice, out: Path) -> None:
    """The ranks as settings of `lowrank train` and `lowrank resize`, in YAML."""
    import yaml

    text = yaml.safe_dump(choice.config, sort_keys=False, allow_unicode=True, width=200)
    write_file(out, f"# {choice.origin}\n{text}".encode())


def show(choice: Choice, out: Path | None, *, as_object: bool) -> None:
    """The table and the sentences, or one JSON object."""
    if as_object:
        say(json.dumps(choice.as_json(), allow_nan=False))
        return
    proposal = choice.proposal
    share = f"rank for {proposal.energy:.0%}"
    total = sum(module.total for module in proposal.modules)
    rows = [_row(module, rank, proposal, total) for module, rank in zip(proposal.modules, proposal.ranks, strict=True)]
    say(choice.origin)
    say(*plain_table([("module", "d×k", "of all energy", share, "rank", "holds"), *rows]))
    say(*_words(proposal), *choice.notes)
    if out is not None:
        say(f"ranks: {out}")


def _row(module: ModuleSpectrum, rank: int, proposal: Proposal, total: float) -> tuple[str, ...]:
    needed = module.rank_for(proposal.energy)
    held = module.held_by(rank) / module.total if module.total > 0 else 1.0
    about = "" if module.exact else "~"
    return (
        module.path,
        "×".join(map(str, (module.experts, *module.shape) if module.experts else module.shape)),
        f"{module.total / total:.1%}",
        f"{about}{needed}" if needed is not None else f"> {len(module.squares)}",
        f"{module.given} → {rank}" if module.given else str(rank),
        f"{about}{min(held, 1.0):.1%}",
    )


def _words(proposal: Proposal) -> list[str]:
    low, high = min(proposal.ranks), max(proposal.ranks)
    span = f"Ranks {low} to {high}" if low != high else f"Rank {low} everywhere"
    words = f"{span}, {proposal.parameters:,} numbers in all A and B: {proposal.held:.1%} of the energy is held"
    if proposal.uniform:
        words += f"; a uniform rank of {proposal.uniform} for as many holds {proposal.held_uniform:.1%}"
    lines = [f"{words}."]
    if any(not module.exact for module in proposal.modules):
        lines.append("~: estimated from a random sketch of the gradient.")
    return lines
