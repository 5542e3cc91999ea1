"""What loading an adapter found."""

from dataclasses import dataclass

from lowrank.errors import some


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The outcome of one load. `print(report)` shows it.

    modules: paths that got low-rank factors; full: paths that got tensors in full; unknown_fields: config fields that
    were not understood and not used; renamed: the leading part of the file's paths that was exchanged, or None;
    base_differences: how the base differs from the one the adapter was made for; changes_nothing: every ΔW is zero and
    every full tensor equals the base's; notes: what else a careful reader would want to know.
    """

    adapter_name: str
    modules: tuple[str, ...]
    full: tuple[str, ...] = ()
    unknown_fields: tuple[str, ...] = ()
    renamed: str | None = None
    base_differences: tuple[str, ...] = ()
    changes_nothing: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for what was loaded, one for each finding."""
        full = f" and {len(self.full)} with tensors in full" if self.full else ""
        lines = [f"adapter {self.adapter_name!r}: {len(self.modules)} modules{full}"]
        if self.unknown_fields:
            lines.append(f"config fields not understood and not used: {some(self.unknown_fields, 8)}")
        if self.renamed:
            lines.append(f"module paths renamed: {self.renamed}")
        lines += self.base_differences
        if self.changes_nothing:
            lines.append("the adapter changes nothing: every ΔW is zero")
        return "\n".join([*lines, *self.notes])
