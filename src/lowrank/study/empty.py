"""A model that is its architecture alone: built from its config, no weight is read."""

from pathlib import Path

import torch
from torch import nn

from lowrank.errors import CheckpointError


def empty_model(folder: Path, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The model's architecture on the meta device. attention: the implementation, as transformers names it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    names = getattr(config, "architectures", None) or []
    cls = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if cls is None:
        raise CheckpointError(
            f"model {folder}: its config names no architecture of transformers {transformers.__version__}"
        )
    if attention is not None:
        config._attn_implementation = attention
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model.to(dtype)
