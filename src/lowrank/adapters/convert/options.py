"""What a conversion may be told, because the files do not say it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowrank.checkpoint.adapter_folder import AdapterContent
from lowrank.checkpoint.read import Packing


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Each is None where it is not known or not wanted.

    model: folder of the base, of which GGUF needs the config; alpha, enable_lora: of a loralib file; dtype: of the
    factors written; allow_pickle: whether `.bin` files may be read, by torch.load(weights_only=True); packing: of
    stacked experts' B.
    """

    model: Path | None = None
    alpha: float | None = None
    enable_lora: Sequence[bool] | None = None
    dtype: torch.dtype | None = None
    allow_pickle: bool = False
    packing: Packing | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """An adapter that was read, and what a careful reader would want to know of how."""

    content: AdapterContent
    notes: tuple[str, ...] = field(default=())
