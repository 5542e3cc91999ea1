"""Stored forms as they lie in files, one format a file: which tensors make up one weight, and how it is read.

bitsandbytes   `.absmax`, `.quant_map`, `.quant_state...`, nested or not; int8 with `.SCB`
scales         FP8 and int8 with `weight_scale_inv` (DeepSeek, Qwen) or `weight_scale` (compressed-tensors, ModelOpt)
mxfp4          `_blocks` and `_scales` of gpt-oss's experts
"""

from collections.abc import Callable, Mapping
from typing import Any

from lowrank.modelfiles.forms import bitsandbytes, mxfp4, scales
from lowrank.modelfiles.forms.found import Found, plain_dtype
from lowrank.modelfiles.tensors import Source, StoredEntry

Finder = Callable[[Mapping[str, Source], Mapping[str, Any], str], Found]
FINDERS: list[Finder] = [bitsandbytes.find, scales.find, mxfp4.find]  # open: append one for another format


def find_forms(tensors: Mapping[str, Source], config: Mapping[str, Any] | None) -> dict[str, Source]:
    """The weights of files as a model has them: {name: source}, those in a stored form as one tensor each.

    Raises CheckpointError for a form whose parts are missing or do not fit each other.
    """
    said = (config or {}).get("quantization_config")
    method = said if isinstance(said, dict) else {}
    plain = plain_dtype(tensors, config)
    logical = dict(tensors)
    for find in FINDERS:
        found = find(logical, method, plain)
        for part in found.parts:
            logical.pop(part, None)
        logical |= found.weights
    return {name: logical[name] for name in sorted(logical, key=_in_file_order(tensors, logical))}


def _in_file_order(tensors: Mapping[str, Source], logical: Mapping[str, Source]) -> Callable[[str], int]:
    place = {name: number for number, name in enumerate(tensors)}
    first = {name: min(place[part.entry.name] for part in _parts(source)) for name, source in logical.items()}
    return first.__getitem__


def _parts(source: Source) -> list[Source]:
    return list(source.entry.form.parts.values()) if isinstance(source.entry, StoredEntry) else [source]
