"""What a base looks like from outside, kept beside an adapter to notice when it is loaded onto another one."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from lowrank.checkpoint.gather import own_class
from lowrank.core.stored.of_module import frozen_shape

# What differs between two loads of one base: where it came from, how it runs, which head it got.
VOLATILE = {
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "auto_map",
    "use_cache",
    "torchscript",
    "_commit_hash",
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "gradient_checkpointing",
    "quantization_config",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "pad_token_id",
}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """architecture: the model's class; config_sha256: of its config without VOLATILE fields, None without a config;

    shapes: {path: shape of the weight} of the adapted modules.
    """

    architecture: str
    config_sha256: str | None
    shapes: dict[str, list[int]] = field(default_factory=dict)

    def differences(self, other: "Fingerprint") -> list[str]:
        """In which ways the base `other` is not the one this was taken from; shapes are compared elsewhere."""
        found = []
        if self.architecture != other.architecture:
            found.append(f"it was made for a {self.architecture}, this is a {other.architecture}")
        if self.config_sha256 != other.config_sha256 and None not in (self.config_sha256, other.config_sha256):
            found.append("the model's config differs from that of the base it was made for")
        return found


def fingerprint(model: nn.Module, adapted: Mapping[str, nn.Module] | None = None) -> Fingerprint:
    """The fingerprint of `model`, with the shapes of the weights of its `adapted` modules, by path."""
    shapes = {path: list(frozen_shape(module)) for path, module in sorted((adapted or {}).items())}
    return Fingerprint(own_class(model).__name__, config_digest(getattr(model, "config", None)), shapes)


def config_digest(config: object) -> str | None:
    """sha256 of a config's lasting fields; None for what is no config.

    A transformers config counts with the fields that differ from its class's defaults, so that a release which adds
    fields does not change the digest.
    """
    fields = _fields(config)
    if fields is None:
        return None
    text = json.dumps(_lasting(fields), sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def _fields(config: object) -> dict[str, Any] | None:
    if isinstance(config, dict):
        return config
    if dataclasses.is_dataclass(config) and not isinstance(config, type) and not hasattr(config, "to_diff_dict"):
        return dataclasses.asdict(config)
    to_dict = getattr(config, "to_diff_dict", None) or getattr(config, "to_dict", None)
    return cast(dict[str, Any], to_dict()) if callable(to_dict) else None


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _lasting(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list | tuple):
        return [_lasting(item) for item in value]
    return value
