"""The weights W0 that an adapter changes, from the base's files alone: read one at a time, no model is built."""

import os
from dataclasses import dataclass

from torch import Tensor

from lowrank.checkpoint import AdapterFiles
from lowrank.errors import CheckpointError
from lowrank.files.safetensors import FLOATS
from lowrank.merge.disk.adapters import Adapter
from lowrank.merge.disk.match import match
from lowrank.modelfiles.base import BaseFiles, Source, read_base
from lowrank.modelfiles.blocks import whole


@dataclass(frozen=True)
class BaseWeights:
    """Where the base stores W0 of every adapted module. sources: {module: (tensor's name, stored as W0ᵀ)}, in the

    order of the files, so that one pass over them reads each once.
    """

    base: BaseFiles
    sources: dict[str, tuple[str, bool]]

    def matrix(self, path: str) -> Tensor:
        """W0 of h = W0·x, (d, k), in the base's own dtype."""
        name, transposed = self.sources[path]
        stored = whole(Source(*self.base.tensors[name]))
        return stored.t() if transposed else stored


def find_base_weights(files: AdapterFiles, location: str | os.PathLike[str]) -> BaseWeights:
    """The places of an adapter's modules in the base at `location`, found as merging on disk finds them.

    Raises CheckpointError for a base whose files are damaged, that is not this adapter's (all faults listed), or that
    is quantised.
    """
    base = read_base(location)
    found = match(base, Adapter(files.folder, files, 1.0))
    order = {name: place for place, name in enumerate(base.tensors)}
    sources: dict[str, tuple[str, bool]] = {}
    for result_name, contribution in found.changed.items():
        name = found.heads.get(result_name, result_name)
        if (dtype := base.tensors[name][1].dtype) not in FLOATS:
            raise CheckpointError(
                f"{base.folder}: {name} is stored as {dtype}, a form that is not read here: give the base that it was "
                "made from"
            )
        sources[contribution.path] = name, contribution.transposed
    return BaseWeights(base, dict(sorted(sources.items(), key=lambda item: order[item[1][0]])))
