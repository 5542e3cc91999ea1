"""How the base stores a target's W0, told from shapes, and for square matrices from the architecture."""

from collections.abc import Iterable

from lowrank.checkpoint.keys import MAGNITUDE
from lowrank.checkpoint.layout import magnitude_shape, wanted_shapes
from lowrank.checkpoint.read import AdapterFiles
from lowrank.injection.architectures import QUERY_VALUE
from lowrank.modelfiles.base import BaseFiles

Shape = tuple[int, ...]

# Architectures whose linear layers are transformers' Conv1D, which stores W0ᵀ, and the names of those layers.
CONV1D_MODELS = frozenset({"gpt2", "imagegpt", "decision_transformer", "openai-gpt"})
CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def kinds_that_fit(files: AdapterFiles, path: str, weight: Shape) -> list[str]:
    """The layer kinds of a tensor of shape `weight` for which the factors of `path` have the right shapes."""
    kind = files.kind(path)
    a, b = (tuple(tensor.shape) for tensor in files.pair(path))
    possible = ["linear", "conv1d-linear"] if kind == "linear" else [kind]
    if (len(weight) < 3) if kind == "conv" else (len(weight) != 2):
        return []
    groups = a[1] // weight[1] if kind == "conv" and len(a) > 1 and weight[1] else 1
    rank = files.config.rank(path)
    magnitude = files.low_rank[path].get(MAGNITUDE)
    fitting = [kind for kind in possible if groups and wanted_shapes(kind, weight, rank, groups) == (a, b)]
    if magnitude is None:
        return fitting
    return [kind for kind in fitting if magnitude_shape(kind, weight) == tuple(magnitude.shape)]


def shape_fault(files: AdapterFiles, path: str, weight: Shape) -> str:
    """One phrase for factors that fit no layer kind."""
    shapes = [f"{role} {list(tensor.shape)}" for role, tensor in sorted(files.low_rank[path].items())]
    rank = files.config.rank(path)
    return f"{path}: {', '.join(shapes)} of rank {rank} do not fit the base's tensor of shape {list(weight)}"


def stores_transposed(base: BaseFiles, files: AdapterFiles, path: str, others: Iterable[str]) -> bool:
    """Whether a square tensor is W0ᵀ. others: the kinds of this adapter's targets whose shapes leave no doubt.

    The architecture decides where config.json names one we know. Without it the other targets do, then the adapter's
    own word (`fan_in_fan_out`), which comes last because files say it wrongly.
    """
    model_type = str((base.config or {}).get("model_type"))
    if model_type in CONV1D_MODELS:
        return path.rpartition(".")[2] in CONV1D_LAYERS
    if model_type in QUERY_VALUE:
        return False
    seen = set(others) & {"linear", "conv1d-linear"}
    if len(seen) == 1:
        return seen == {"conv1d-linear"}
    return files.config.raw.get("fan_in_fan_out") is True
