"""gpt-oss's experts in files: `NAME_blocks` (E, n, k/32, 16) and `NAME_scales` (E, n, k/32) are NAME, (E, k, n)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.core.stored import Mxfp4
from lowrank.files.safetensors import FLOATS
from lowrank.modelfiles.blocks import mapped_flat
from lowrank.modelfiles.forms.found import Found, check_shape, part, refuse
from lowrank.modelfiles.tensors import Source

BLOCK_BYTES = 16


@dataclass(eq=False)
class Mxfp4Form:
    """A stack of matrices, each stored transposed; a row of the whole is an expert."""

    parts: dict[str, Source]
    dtype: torch.dtype
    scheme: str = "MXFP4"

    def rows(self, rows: slice) -> Tensor:
        """Experts, (n', k·n)."""
        blocks, scales = (
            mapped_flat(self.parts[role]).view(self.parts[role].entry.shape) for role in ("blocks", "scales")
        )
        return torch.stack(
            [Mxfp4(blocks[e], scales[e], self.dtype).matrix().t().flatten() for e in range(rows.start, rows.stop)]
        )


def find(tensors: Mapping[str, Source], method: Mapping[str, Any], plain: str) -> Found:
    """Every stack of MXFP4 blocks, where config.json says that the model is of them."""
    found = Found()
    for name in tensors:
        weight = name.removesuffix("_blocks")
        if weight == name or (f"{weight}_scales" not in tensors and method.get("quant_method") != "mxfp4"):
            continue
        parts = {"blocks": tensors[name], "scales": part(tensors, f"{weight}_scales", weight, ("U8",))}
        shape = parts["blocks"].entry.shape
        if parts["blocks"].entry.dtype != "U8" or len(shape) != 4 or shape[3] != BLOCK_BYTES:
            refuse(
                weight, f"{name} is {parts['blocks'].entry.dtype} of shape {list(shape)}, wanted U8 (E, n, k/32, 16)"
            )
        check_shape(parts["scales"].entry, shape[:3])
        whole = (shape[0], math.prod(shape[2:]) * 2, shape[1])
        found.add(weight, plain, whole, Mxfp4Form(parts, FLOATS[plain]), parts["blocks"])
    return found
