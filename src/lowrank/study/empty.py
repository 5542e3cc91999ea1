"""A model that is its architecture alone: built from its config, no weight is read."""

from pathlib import Path

import torch
from torch import nn

from lowrank.errors import CheckpointError
from lowrank.train.models import config_of, loading

MOST_LAYERS = 10_000  # each is built


def empty_model(folder: Path, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The model's architecture on the meta device. attention: the implementation, as transformers names it.

    Raises CheckpointError for a config that makes none.
    """
    import transformers

    config = config_of(folder)
    names = getattr(config, "architectures", None)
    names = names if isinstance(names, list | tuple) else []
    classes = [getattr(transformers, str(name), None) for name in names]
    cls = next((c for c in classes if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)
    if cls is None:
        raise CheckpointError(
            f"model {folder}: its config names no architecture of transformers {transformers.__version__}"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise CheckpointError(f"model {folder}: its config says that it has {layers} layers, beyond any model")
    if attention is not None:
        config._attn_implementation = attention
    with loading(folder, "its config makes no model"), torch.device("meta"):
        model: nn.Module = cls(config).to(dtype)
    return model
