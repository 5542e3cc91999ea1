"""In which form the base was held while an adapter was trained, and how far another form is from it.

`lowrank.json` keeps the form's name, its dtype, and a few of the base's numbers as training saw them (`probe`): the
first block of some of the adapted weights. On loading, what the model at hand has in their place is compared with them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.core.stored.of_module import is_readable, stored_weight

MODULES, NUMBERS = 4, 64  # so many weights, and so many numbers of each
MOVED = "_lowrank_moved"  # on a module: what LoftQ's rounds took off W0 before it was quantised
ALIKE = 1e-6  # relative; less is a rounding of dtypes


@dataclass(frozen=True, slots=True)
class StoredBase:
    """form: as `Stored.form` says it; dtype: of the matrix as it is read; probe: {module: the first numbers of W0}.

    block: how many numbers share a scale, where the form has blocks; plain: adapted modules that were not quantised.
    """

    form: str
    dtype: str
    probe: dict[str, tuple[float, ...]] = field(default_factory=dict)
    block: int | None = None
    plain: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For `lowrank.json`."""
        blocks = {} if self.block is None else {"block": self.block}
        return {"form": self.form, "dtype": self.dtype, "probe": self.probe, "plain": list(self.plain)} | blocks

    def renamed(self, rename: Callable[[str], str]) -> "StoredBase":
        """The same for a model whose paths differ."""
        probe = {rename(path): numbers for path, numbers in self.probe.items()}
        return replace(self, probe=probe, plain=tuple(rename(path) for path in self.plain))

    def differences(self, model: nn.Module) -> list[str]:
        """One sentence where the model holds other numbers than those that the adapter was trained over."""
        modules = dict(model.named_modules())
        share = self.distance(lambda path: _first(modules[path]) if path in modules else None)
        if not share:
            return []
        now = sorted({_form(modules[path]) for path in self.probe})
        return [
            f"it was trained over a base held in {self.form}, and this one is held in {' and '.join(now)}: W0 differs "
            f"by {share:.1%}, so the answers are not those of the training"
        ]

    def distance(self, first: Callable[[str], Tensor | None]) -> float | None:
        """‖W0 here − W0 in training‖ in parts of the latter, over the probe; first: the first numbers of a module's W0.

        0 where only dtypes differ, None where it cannot be told.
        """
        squares = total = 0.0
        for path, numbers in self.probe.items():
            here = first(path)
            if here is None or len(here) != len(numbers):
                return None
            then = torch.tensor(numbers, dtype=torch.float64)
            squares += float((here - then).square().sum())
            total += float(then.square().sum())
        share = (squares / total) ** 0.5 if total else 0.0
        return share if share > ALIKE else 0.0


def stored_base(modules: Iterable[tuple[str, nn.Module]]) -> StoredBase | None:
    """What is to be remembered of adapted modules; None where none of them is in a stored form."""
    all_modules = list(modules)
    found = [(path, stored_weight(module)) for path, module in all_modules if is_readable(module)]
    if not found:
        return None
    plain = tuple(path for path, module in all_modules if not is_readable(module))
    step = max(1, len(found) // MODULES)
    chosen = found[::step][:MODULES]
    probe = {path: tuple(stored.rows(slice(0, 1)).flatten()[:NUMBERS].double().tolist()) for path, stored in chosen}
    first = found[0][1]
    moved = any(MOVED in module.__dict__ for _, module in all_modules)
    form = first.form + (", moved by LoftQ" if moved else "")
    block = getattr(first, "block", None)
    size = block if isinstance(block, int) else None
    return StoredBase(form, str(first.dtype).removeprefix("torch."), probe, size, plain)


def _form(module: nn.Module) -> str:
    return stored_weight(module).form if is_readable(module) else str(module._parameters["weight"].dtype)[6:]  # type: ignore[union-attr]


def _first(module: nn.Module) -> Tensor | None:
    """The first numbers of the module's W0, in float64."""
    if is_readable(module):
        return stored_weight(module).rows(slice(0, 1)).flatten()[:NUMBERS].double().cpu()
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.dim() != 2 or weight.is_meta:
        return None
    return weight.detach()[0, :NUMBERS].double().cpu()
