"""An adapter at another rank, from its files alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank.adapters.each_module import Progress, for_each, module_seed, one_core_each, silent
from lowrank.adapters.energy import ModuleEnergy, headline, overall
from lowrank.checkpoint.adapter_folder import AdapterPath, content_of, write_adapter
from lowrank.checkpoint.each_expert import read_each_expert
from lowrank.checkpoint.outputs import claimed
from lowrank.checkpoint.target import Target
from lowrank.core.finite import LARGEST
from lowrank.core.recompress import recompress
from lowrank.core.truncation import Cut, check_energy, check_rank
from lowrank.errors import ConfigError
from lowrank.injection.patterns import check_patterns, pattern_value


@dataclass(frozen=True, slots=True)
class ResizeReport:
    """What was resized. kept: the share of Σ‖ΔW‖²_F over all modules that the result holds."""

    modules: tuple[ModuleEnergy, ...]
    kept: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The ranks and the energy, the module that lost most, and what else there is to say."""
        return "\n".join([*headline(self.modules), *self.notes])


@one_core_each()
def resize_adapter(
    adapter: AdapterPath,
    out: AdapterPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> ResizeReport:
    """Write to `out` the adapter in `adapter` with another rank and the same scale s in every module.

    Downwards ΔW becomes its best approximation, module by module. rank: of every module; energy: the smallest rank that
    keeps this share of a module's ‖ΔW‖²_F; with both, the smaller of the two; ranks: {regex that ends a module's name:
    its rank}, first match wins; modules that none matches get `rank`, or else keep the one they have.

    Upwards (without `energy`) ΔW stays as it is, and there is room for training: new rows of A are drawn with `seed`,
    as large as the old ones, and the new columns of B are zero. lora_alpha follows the rank, so that s = lora_alpha/r
    stays (lora_alpha/√r with rsLoRA).

    For DoRA the ΔW inside the direction is resized and the magnitudes stay; the report says so. Tensors kept in full
    are copied.

    Raises ConfigError for arguments that cannot be meant, CheckpointError for files that cannot be read or written.
    """
    check_rank(rank)
    check_energy(energy)
    if rank is None and energy is None and not ranks:
        raise ConfigError("resize: give a rank, ranks by module, or the share of the energy to keep")
    for pattern in ranks.values() if ranks else ():
        check_rank(pattern)
    files = read_each_expert(adapter, allow_pickle)
    content = content_of(files)
    paths = list(content.targets)
    check_patterns("ranks", ranks or {}, paths)
    if energy is None:
        _check_room(content.targets, [*([rank] if rank else []), *(ranks or {}).values()])

    def resize(path: str) -> tuple[Target, ModuleEnergy]:
        target = content.targets[path]
        kept = rank if rank is not None or energy is not None else target.a.shape[0]
        return _resize(path, target, Cut(pattern_value(path, ranks or {}, kept, "ranks"), energy), seed)

    with claimed(out, {"adapter": files.folder}) as folder:
        results = for_each(paths, resize, progress)
        targets = dict(zip(paths, (target for target, _ in results), strict=True))
        write_adapter(folder, replace(content, targets=targets))
    modules = tuple(module for _, module in results)
    return ResizeReport(modules, overall(modules), _notes(targets.values()))


def _check_room(targets: Mapping[str, Target], ranks: Sequence[int]) -> None:
    """Raise ConfigError for a rank that no ΔW here could have: rows for it would only fill the disk."""
    most = max(max(min(target.shape), target.a.shape[0]) for target in targets.values())
    if max(ranks, default=0) > most:
        raise ConfigError(f"rank {max(ranks)} is more than any change of this adapter can have, which is {most}")


def _resize(path: str, target: Target, cut: Cut, seed: int) -> tuple[Target, ModuleEnergy]:
    before = target.a.shape[0]
    compressed = recompress(target.a, target.b, cut)
    if cut.energy is None and cut.rank is not None and cut.rank >= before:
        a, b = _grown(target, cut.rank, module_seed(seed, path))
        kept = 1.0
    else:
        a, b, kept = compressed.a, compressed.b, compressed.kept
    norm = math.sqrt(compressed.total) * abs(target.scale)
    if norm > LARGEST:
        raise FloatingPointError(f"its ΔW at scale {target.scale:g} is too large to compute with")
    return replace(target, a=a, b=b), ModuleEnergy(path, (before,), a.shape[0], kept, norm)


def _grown(target: Target, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A with random rows added, of the old rows' root mean square, and B with zero columns."""
    more = rank - target.a.shape[0]
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(more, target.a.shape[1], generator=generator, dtype=target.a.dtype)
    new *= target.a.square().mean().sqrt()
    return torch.cat([target.a, new]), torch.cat([target.b, target.b.new_zeros(target.b.shape[0], more)], dim=1)


def _notes(targets: Iterable[Target]) -> tuple[str, ...]:
    if all(target.magnitude is None for target in targets):
        return ()
    return ("DoRA: the energy is that of the ΔW inside the direction; the magnitudes are as they were",)
