"""The factors of a plan's entry at step 0."""

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lowrank.core.dora import row_norms
from lowrank.core.factors import LoraFactors
from lowrank.core.finite import named
from lowrank.core.init import Init, Site, embedding
from lowrank.core.rows import RowBlock
from lowrank.core.shards import whole
from lowrank.core.stored.stack import StoredStack
from lowrank.injection.config import LoraConfig
from lowrank.injection.plan import PlanEntry
from lowrank.layers.embedding import LoraEmbedding
from lowrank.layers.stack import LoraStack

NOT_FOR_LOOKUPS = (True, "gaussian", "kaiming")  # a random A would move every token with every other


def create_factors(entry: PlanEntry, module: nn.Module, config: LoraConfig, init: Init) -> LoraFactors:
    """A and B as `init` starts them, one pair per part of a fused projection, stacked; float32 or wider."""
    if issubclass(entry.kind, LoraStack):
        return _of_every_expert(entry, module, config, init)
    if issubclass(entry.kind, LoraEmbedding) and config.init_lora_weights in NOT_FOR_LOOKUPS:
        init = embedding
    weight = entry.kind.dense(module)
    matrix = weight.t() if entry.kind.transposed else weight
    with named(entry.path):
        starts = [init(site) for site in _sites(entry, matrix)]
    a, b = starts[0].a, starts[0].b
    if len(starts) > 1:
        a, b = torch.cat([start.a for start in starts]), torch.cat([start.b for start in starts])
    factors = LoraFactors(
        a,
        b,
        entry.scale,
        config.lora_dropout,
        start=(a.clone(), b.clone()) if starts[0].subtract else None,
        parts=entry.parts,
        out_features=entry.d,
    )
    if config.use_dora:
        factors.magnitude = nn.Parameter(_norms(matrix, factors), requires_grad=False)
    return factors


def _of_every_expert(entry: PlanEntry, module: nn.Module, config: LoraConfig, init: Init) -> LoraFactors:
    """A (E, r, k) and B (E, d, r), every expert's pair as `init` starts it from that expert's own W0."""
    with named(entry.path):
        starts = [init(site) for matrix in _experts(entry, module) for site in _sites(entry, matrix)]
    count = len(entry.rows)  # of pairs in every expert: one, or one for each part
    a, b = (
        torch.stack([torch.cat(pairs[i : i + count]) for i in range(0, len(pairs), count)])
        for pairs in ([start.a for start in starts], [start.b for start in starts])
    )
    start = (a.clone(), b.clone()) if starts[0].subtract else None
    factors = LoraFactors(a, b, entry.scale, config.lora_dropout, start=start, parts=entry.parts, out_features=entry.d)
    if config.use_dora:
        weight = entry.kind.dense(module)
        matrices = weight.mT if entry.kind.transposed else weight
        factors.magnitude = nn.Parameter(_norms(matrices, factors), requires_grad=False)
    return factors


def _experts(entry: PlanEntry, module: nn.Module) -> Iterator[Tensor]:
    """Every expert's W0, (d, k); one after another where they are held in a stored form."""
    frozen = entry.kind.frozen(module)
    if isinstance(frozen, StoredStack):
        yield from (frozen.of_expert(expert).matrix() for expert in range(frozen.shape[0]))
    else:
        weight = whole(cast(Tensor, frozen))
        yield from (weight.mT if entry.kind.transposed else weight).unbind()


def _norms(matrix: Tensor, factors: LoraFactors) -> Tensor:
    """DoRA's magnitude at step 0: ‖W0 + ΔW‖ of every row, (d,) or (E, d), so that the gain is exactly 1."""
    a, b = factors.effective()
    return row_norms(whole(matrix), a.detach(), b.detach(), factors.scale)


def _sites(entry: PlanEntry, matrix: Tensor) -> list[Site]:
    """Where a pair (A, B) goes: the whole matrix (d, k), or each part's rows of it."""
    wide = torch.promote_types(torch.float32, matrix.dtype)

    def site(d: int, part: RowBlock | None) -> Site:
        return Site(d, entry.k, entry.rank, entry.scale, partial(_rows, matrix, part, wide), matrix.device, wide)

    return [site(part.size, part) for part in entry.parts] or [site(entry.d, None)]


def _rows(matrix: Tensor, part: RowBlock | None, dtype: torch.dtype) -> Tensor:
    matrix = whole(matrix)
    rows = matrix if part is None else matrix[part.indices().to(matrix.device)]
    return rows.to(dtype)
