"""What an injection will do, before it does anything: a value that prints as a table."""

from dataclasses import dataclass

from lowrank.core.rows import RowBlock
from lowrank.injection.token_rows import RowsEntry
from lowrank.layers.base import LoraLayer


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One target: the module's path, its layer kind, W0's (d, k), and the factors it gets.

    parts: row blocks of a fused projection, with their names; empty where the whole weight is adapted.
    experts: how many matrices of that shape a stack holds, each of which gets factors; 0 for a single matrix.
    """

    path: str
    kind: type[LoraLayer]
    d: int
    k: int
    rank: int
    alpha: float
    scale: float
    parts: tuple[RowBlock, ...] = ()
    part_names: tuple[str, ...] = ()
    experts: int = 0

    @property
    def rows(self) -> tuple[int, ...]:
        """The output widths that get a B of their own."""
        return tuple(part.size for part in self.parts) or (self.d,)

    @property
    def parameters(self) -> int:
        """How many numbers A and B hold: r·(k + d_i) for every part i, of every expert."""
        return sum(self.rank * (self.k + rows) for rows in self.rows) * (self.experts or 1)

    @property
    def shape(self) -> str:
        """d×k, or E×d×k."""
        return f"{self.experts}×{self.d}×{self.k}" if self.experts else f"{self.d}×{self.k}"

    @property
    def label(self) -> str:
        """The path, with the parts of a fused projection."""
        return f"{self.path}[{','.join(self.part_names)}]" if self.part_names else self.path


@dataclass(frozen=True, slots=True)
class InjectionPlan:
    """Everything one `inject` does. `print(plan)` shows it as a table.

    entries: the low-rank targets; saved_modules: paths trained and saved in full; biases: paths whose bias is trained;
    rows: single rows of tables that are trained;
    plain_paths: what the fused function will not compute, and why (known once injected); warnings: what works but is
    probably not meant; left_out: what "all-linear" does not adapt, and its share of the weights; base_parameters,
    full_parameters: counts for the share in the table.
    """

    entries: tuple[PlanEntry, ...]
    saved_modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    plain_paths: tuple[str, ...] = ()
    left_out: str = ""
    base_parameters: int = 0
    full_parameters: int = 0
    dora: bool = False
    rows: tuple[RowsEntry, ...] = ()

    @property
    def low_rank_parameters(self) -> int:
        """The numbers in all A and B, and in DoRA's magnitudes."""
        return sum(entry.parameters + (entry.d * (entry.experts or 1) if self.dora else 0) for entry in self.entries)

    @property
    def trainable_parameters(self) -> int:
        """Low-rank parameters plus what is trained in full (modules_to_save, biases)."""
        return self.low_rank_parameters + self.full_parameters

    @property
    def stacks(self) -> list[PlanEntry]:
        """The targets that are stacks of experts."""
        return [entry for entry in self.entries if entry.experts]

    def experts_line(self) -> str:
        """One line on the stacks of experts: how many there are of how many experts, and their share of what trains."""
        count = sum(entry.parameters for entry in self.stacks)
        sizes = " or ".join(map(str, sorted({entry.experts for entry in self.stacks})))
        one = len(self.stacks) == 1
        return (
            f"{len(self.stacks)} stack{'' if one else 's'} of {sizes} experts, {count:,} parameters, "
            f"{count / self.trainable_parameters:.0%} of what is trained"
        )

    def summary(self) -> str:
        """One line: targets, ranks, trained parameters and their share of the base."""
        ranks = sorted({entry.rank for entry in self.entries})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        share = self.trainable_parameters / self.base_parameters if self.base_parameters else 0.0
        full = f" + {len(self.saved_modules)} modules in full" if self.saved_modules else ""
        full += f" + {sum(len(entry.indices) for entry in self.rows)} rows of tokens" if self.rows else ""
        return (
            f"{len(self.entries)} targets of rank {span}{full}: {self.trainable_parameters:,} trained parameters, "
            f"{share:.2%} of the base's {self.base_parameters:,}"
        )

    def __str__(self) -> str:
        """The table of targets, then what is trained in full, then warnings, then the sum."""
        header = ("module", "kind", "shape d×k", "rank", "alpha", "scale", "parameters")
        rows = [
            (
                e.label,
                e.kind.kind,
                e.shape,
                str(e.rank),
                f"{e.alpha:g}",
                f"{e.scale:g}",
                f"{e.parameters:,}",
            )
            for e in self.entries
        ]
        lines = _table([header, *rows])
        lines += [f"experts: {self.experts_line()}"] if self.stacks else []
        lines += [f"in full: {path}" for path in self.saved_modules]
        lines += [f"bias:    {path}" for path in self.biases]
        lines += [f"rows:    {entry}" for entry in self.rows]
        lines += [f"plain path: {text}" for text in self.plain_paths]
        lines += [f"not adapted: {self.left_out}"] if self.left_out else []
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*lines, self.summary()])


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell, the first two flush left and the numbers flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
