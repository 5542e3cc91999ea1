"""gpt-oss's experts in files: `NAME_blocks` (E, n, k/32, 16) and `NAME_scales` (E, n, k/32) are NAME, (E, k, n)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.core.stored import Mxfp4, Stored
from lowrank.files.safetensors import FLOATS
from lowrank.modelfiles.forms.found import Found, check_shape, one_of, part, refuse
from lowrank.modelfiles.tensors import Source

BLOCK_BYTES = 16


@dataclass(eq=False)
class Mxfp4Form:
    """A stack of matrices, each stored transposed; a row of the whole is an expert."""

    parts: dict[str, Source]
    dtype: torch.dtype
    scheme: str = "MXFP4"
    transposed: bool = True

    def unstacked(self, parts: Mapping[str, Tensor]) -> Iterator[Stored]:
        """Each expert's blocks, of the transposed."""
        return (self._expert(number, parts) for number in range(self.parts["weight"].entry.shape[0]))

    def _expert(self, number: int, parts: Mapping[str, Tensor]) -> Mxfp4:
        blocks, scales = (one_of(self.parts[role], number, parts.get(role)) for role in ("weight", "scales"))
        return Mxfp4(blocks, scales, self.dtype)

    def stacked(self, experts: Sequence[Stored]) -> dict[str, Tensor]:
        """Blocks and scales of all."""
        own = [expert for expert in experts if isinstance(expert, Mxfp4)]
        return {"weight": torch.stack([e.blocks for e in own]), "scales": torch.stack([e.scales for e in own])}

    def rows(self, rows: slice) -> Tensor:
        """Experts, (n', k·n)."""
        experts = (self._expert(number, {}) for number in range(rows.start, rows.stop))
        return torch.stack([expert.matrix().t().flatten() for expert in experts])


def find(tensors: Mapping[str, Source], method: Mapping[str, Any], plain: str) -> Found:
    """Every stack of MXFP4 blocks, where config.json says that the model is of them."""
    found = Found()
    for name in tensors:
        weight = name.removesuffix("_blocks")
        if weight == name or (f"{weight}_scales" not in tensors and method.get("quant_method") != "mxfp4"):
            continue
        parts = {"weight": tensors[name], "scales": part(tensors, f"{weight}_scales", weight, ("U8",))}
        shape = parts["weight"].entry.shape
        if parts["weight"].entry.dtype != "U8" or len(shape) != 4 or shape[3] != BLOCK_BYTES:
            refuse(
                weight, f"{name} is {parts['weight'].entry.dtype} of shape {list(shape)}, wanted U8 (E, n, k/32, 16)"
            )
        check_shape(parts["scales"].entry, shape[:3])
        whole = (shape[0], math.prod(shape[2:]) * 2, shape[1])
        found.add(weight, plain, whole, Mxfp4Form(parts, FLOATS[plain]), parts["weight"])
    return found
