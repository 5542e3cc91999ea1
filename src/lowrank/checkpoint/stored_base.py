"""In which form the base was held while an adapter was trained, and how far another form is from it.

`lowrank.json` keeps the form's name, its dtype, and a few of the base's numbers as training saw them (`probe`): the
first block of some of the adapted weights. On loading, what the model at hand has in their place is compared with them.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.core.stored import Stored
from lowrank.core.stored.of_module import frozen, is_readable, stored_weight
from lowrank.core.stored.stack import StoredStack
from lowrank.injection.traversal import base_modules
from lowrank.layers.stack import ExpertStack

MODULES, NUMBERS = 4, 64  # so many weights, and so many numbers of each
MOVED = "_lowrank_moved"  # on a module: what LoftQ's rounds took off W0 before it was quantised
BY_LOFTQ = ", moved by LoftQ"  # behind the form's name
ALIKE = 1e-6  # relative; less is a rounding of dtypes


@dataclass(frozen=True, slots=True)
class StoredBase:
    """form: as `Stored.form` says it; dtype: of the matrix as it is read; probe: {module: the first numbers of W0}.

    block: how many numbers share a scale, where the form has blocks; plain: adapted modules that were not quantised;
    rest: quantised modules that are not adapted.
    """

    form: str
    dtype: str
    probe: dict[str, tuple[float, ...]] = field(default_factory=dict)
    block: int | None = None
    plain: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For `lowrank.json`."""
        blocks = {} if self.block is None else {"block": self.block}
        modules = {"plain": list(self.plain), "rest": list(self.rest)}
        return {"form": self.form, "dtype": self.dtype, "probe": self.probe} | modules | blocks

    @property
    def quantised(self) -> str:
        """The form before LoftQ moved it."""
        return self.form.removesuffix(BY_LOFTQ)

    @property
    def moved(self) -> bool:
        """Whether LoftQ's further rounds moved the base for this adapter."""
        return self.form.endswith(BY_LOFTQ)

    def renamed(self, rename: Callable[[str], str]) -> "StoredBase":
        """The same for a model whose paths differ."""
        probe = {rename(path): numbers for path, numbers in self.probe.items()}
        plain, rest = (tuple(rename(path) for path in paths) for paths in (self.plain, self.rest))
        return replace(self, probe=probe, plain=plain, rest=rest)

    def differences(self, model: nn.Module) -> list[str]:
        """One sentence where the model holds other numbers than those that the adapter was trained over."""
        modules = dict(base_modules(model))
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


def stored_base(modules: Iterable[tuple[str, nn.Module]], rest: Iterable[str] = ()) -> StoredBase | None:
    """What is to be remembered of adapted modules; None where none of them is in a stored form.

    rest: the paths of quantised modules that are not adapted.
    """
    all_modules = list(modules)
    found = [(path, stored_weight(module)) for path, module in all_modules if is_readable(module)]
    if not found:
        return None
    plain = tuple(path for path, module in all_modules if not is_readable(module))
    step = max(1, len(found) // MODULES)
    chosen = found[::step][:MODULES]
    probe = {path: tuple(_first_of(stored).tolist()) for path, stored in chosen}
    first = found[0][1]
    moved = any(MOVED in module.__dict__ for _, module in all_modules)
    form = first.form + (BY_LOFTQ if moved else "")
    block = getattr(first, "block", None)
    size = block if isinstance(block, int) else None
    return StoredBase(form, str(first.dtype).removeprefix("torch."), probe, size, plain, tuple(rest))


def together(bases: Sequence[StoredBase | None], adapted: Collection[str]) -> StoredBase | None:
    """What is to be remembered of an adapter made of several, which adapts `adapted`: their base, where it is one.

    None where they were trained over different forms, or over bases that LoftQ moved, each its own.
    """
    first = bases[0]
    if first is None or len({None if base is None else (base.form, base.dtype, base.block) for base in bases}) > 1:
        return None
    if first.moved and len(bases) > 1:
        return None
    known = [base for base in bases if base is not None]
    plain, rest = (tuple(dict.fromkeys(p for b in known for p in getattr(b, key))) for key in ("plain", "rest"))
    return replace(first, plain=plain, rest=tuple(path for path in rest if path not in adapted))


def _first_of(stored: Stored) -> Tensor:
    rows = stored.rows(slice(0, 1))
    return (rows[0] if isinstance(stored, StoredStack) else rows)[0, :NUMBERS].double().cpu()


def _form(module: nn.Module) -> str:
    return stored_weight(module).form if is_readable(module) else str(frozen(module).dtype).removeprefix("torch.")


def _first(module: nn.Module) -> Tensor | None:
    """The first numbers of the module's W0 in float64; of a stack, its first expert, as the model has it."""
    if is_readable(module):
        return _first_of(stored_weight(module))
    stack = isinstance(module, ExpertStack)
    weight = cast(Tensor, module.weight)[0] if stack else module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.dim() != 2 or weight.is_meta:
        return None
    turned = getattr(module, "transposed", False) and not stack  # Conv1D has W0ᵀ
    row = weight.detach()[:, 0] if turned else weight.detach()[0]
    return row[:NUMBERS].double().cpu()
