"""What one adapter does to a base, by the names of tensors."""

from dataclasses import dataclass, field

from torch import Tensor

from lowrank.core.token_rows import TokenRows
from lowrank.merge.disk.adapters import Contribution
from lowrank.modelfiles.base import BaseFiles

# Names that a normalisation's tensors had in checkpoints of earlier years.
OLD_NAMES = {"weight": "gamma", "bias": "beta"}


IN_PROJ = "in_proj_weight"  # what nn.MultiheadAttention calls its weight


@dataclass(slots=True)
class Match:
    """What one adapter does, by the names of tensors.

    changed: {tensor: ΔW}; replaced: {tensor: full copy}; rows: {tensor: single rows of it}; heads: {name of a head
    that the base stores only as its embedding: that embedding's tensor}; added: {tensor: full copy} that the base does
    not have; notes: for the report.
    """

    changed: dict[str, Contribution] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, TokenRows] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    notes: list[str] = field(default_factory=list)

    def stored(self, base: BaseFiles, place: str, name: str = "weight") -> tuple[str, str] | None:
        """(name in the result, the base's tensor) for `name` of the module at `place`; None where there is none.

        They differ for a head that is stored only as its embedding.
        """
        full = f"{place}.{name}" if place else name
        if full in self.heads:
            return full, self.heads[full]
        old = f"{place}.{OLD_NAMES.get(name, name)}"
        attention = f"{place}.{IN_PROJ}" if name == "weight" else full
        known = next((known for known in (full, old, attention) if known in base.tensors), None)
        return None if known is None else (known, known)
