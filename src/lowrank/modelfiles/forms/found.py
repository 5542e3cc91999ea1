"""What a finder of stored forms gives, and what all of them need."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

from torch import Tensor

from lowrank.errors import CheckpointError
from lowrank.files.safetensors import FLOATS, Entry
from lowrank.modelfiles.blocks import flat
from lowrank.modelfiles.tensors import Form, Source, StoredEntry

AUXILIARY = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", "_scale", "_scale_inv", "_zero_point"
)  # fmt: skip


@dataclass
class Found:
    """weights: {name: one weight in a form}; parts: the names of the files' tensors that they take in."""

    weights: dict[str, Source] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)

    def add(
        self, name: str, dtype: str, shape: tuple[int, ...], form: Form, home: Source, idle: tuple[str, ...] = ()
    ) -> None:
        """In place: one weight more; home: the part in whose file the weight is written; idle: parts of no use."""
        self.weights[name] = Source(home.shard, StoredEntry(name, dtype, shape, home.entry.offset, form))
        self.parts |= {part.entry.name for part in form.parts.values()} | set(idle)


def plain_dtype(tensors: Mapping[str, Source], config: Mapping[str, Any] | None) -> str:
    """The format's word for the dtype of most weights that are not quantised; config.json's where all are."""
    counts = Counter(
        source.entry.dtype
        for name, source in tensors.items()
        if source.entry.dtype in FLOATS and not name.endswith(AUXILIARY)
    )
    if counts:
        return counts.most_common(1)[0][0]
    said = str((config or {}).get("dtype") or (config or {}).get("torch_dtype"))
    return {"float16": "F16", "float32": "F32"}.get(said, "BF16")


def part(tensors: Mapping[str, Source], name: str, owner: str, dtypes: tuple[str, ...]) -> Source:
    """The part `name` of the weight `owner`. Raises CheckpointError where it is not there or of another dtype."""
    source = tensors.get(name)
    if source is None:
        refuse(owner, f"its part {name} is missing: copy the model again")
    if source.entry.dtype not in dtypes:
        refuse(name, f"it is {source.entry.dtype}, and should be {' or '.join(dtypes)}")
    return source


def one_of(source: Source, number: int, instead: Tensor | None) -> Tensor:
    """Expert `number` of a part that all experts of a stack have in turn; instead: what to take it from."""
    shape = source.entry.shape
    if instead is not None:
        return instead.view(shape)[number]
    size = prod(shape[1:])
    return flat(source, number * size, (number + 1) * size).view(shape[1:])


def check_shape(entry: Entry, *wanted: tuple[int, ...]) -> None:
    """Raise CheckpointError where the tensor has none of the wanted shapes."""
    if entry.shape not in wanted:
        refuse(entry.name, f"it has shape {list(entry.shape)}, wanted {' or '.join(str(list(w)) for w in wanted)}")


def refuse(name: str, why: str) -> NoReturn:
    """Raise CheckpointError for a stored form that cannot be read."""
    raise CheckpointError(f"the quantised weight {name} cannot be read: {why}")
