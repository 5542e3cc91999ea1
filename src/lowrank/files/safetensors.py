"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes end to end.

A header is believed only after every number in it is checked against the file: a file that passes can be read and
copied by offset without another check. https://huggingface.co/docs/safetensors is the format's home.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowrank.errors import CheckpointError, short
from lowrank.files.json_file import parse_json
from lowrank.files.names import is_name
from lowrank.files.regular import opened, read_into

MAX_HEADER = 100_000_000  # bytes: the format's own limit
METADATA = "__metadata__"
ALIGNMENT = 8

BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOATS: dict[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPES: dict[str, torch.dtype] = FLOATS | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
READABLE: dict[str, torch.dtype] = DTYPES | {  # what torch has a dtype for
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file: its name, the format's word for its dtype, its shape, and its bytes' offset in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """The tensor's length in the file."""
        return nbytes_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole file: its header's bytes (length field included), its metadata, its tensors by offset, and its size."""

    header: bytes
    metadata: Mapping[str, str] | None
    entries: tuple[Entry, ...]
    size: int


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """The length in bytes of a tensor in the file."""
    return math.prod(shape) * BITS[dtype] // 8


def read_layout(path: Path) -> Layout:
    """The layout of a safetensors file, checked against its size.

    Raises CheckpointError, naming the file and the tensor, for anything but a whole and well-formed file.
    """
    with _readable(path), opened(path) as (descriptor, size):
        return _layout(path, descriptor, size)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a whole file, each in memory of its own, in the order of their bytes.

    Nothing is allocated that the file's size does not bear out. Raises CheckpointError as `read_layout` does.
    """
    with _readable(path), opened(path) as (descriptor, size):
        layout = _layout(path, descriptor, size)
        return {entry.name: _read(path, descriptor, entry) for entry in layout.entries}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _layout(path: Path, descriptor: int, size: int) -> Layout:
    prefix = bytearray(8)
    if size >= len(prefix):
        read_into(descriptor, memoryview(prefix), 0, path)
    length = int.from_bytes(prefix, "little")
    if size < len(prefix) or length > size - len(prefix):
        _refuse(path, f"it ends inside its header ({size} bytes): the file is truncated, copy it again")
    if length > MAX_HEADER:
        _refuse(path, f"its header claims {length} bytes, above the format's limit of {MAX_HEADER}")
    text = bytearray(length)
    read_into(descriptor, memoryview(text), len(prefix), path)
    return _checked(path, bytes(prefix + text), _parse(path, text), size)


def _read(path: Path, descriptor: int, entry: Entry) -> Tensor:
    if entry.dtype not in READABLE:
        _refuse(path, f"{entry.name!r} has the dtype {entry.dtype}, which torch has not")
    memory = bytearray(entry.nbytes)
    read_into(descriptor, memoryview(memory), entry.offset, path)
    dtype = READABLE[entry.dtype]
    return (torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)).view(entry.shape)


def build_layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> Layout:
    """The layout of a file that holds (name, dtype, shape) end to end in the order given."""
    tensors = list(tensors)
    content: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + nbytes_of(dtype, shape)
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    entries = tuple(
        Entry(name, dtype, shape, len(header) + content[name]["data_offsets"][0]) for name, dtype, shape in tensors
    )
    return Layout(header, metadata, entries, len(header) + end)


def _refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {why}")


def _parse(path: Path, text: bytearray) -> dict[str, Any]:
    if not text.startswith(b"{"):
        _refuse(path, "its header does not begin with '{', so it is no safetensors file")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            _refuse(path, f"its header names {short(repr(twice), 80)} twice")
        return found

    try:
        content = parse_json(text.decode("utf-8"), unique)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not valid JSON ({error}): copy the file again") from error
    assert isinstance(content, dict)
    return content


def _checked(path: Path, header: bytes, content: dict[str, Any], size: int) -> Layout:
    metadata = content.pop(METADATA, None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(_is_text(word) for item in metadata.items() for word in item)
    ):
        _refuse(path, f"its {METADATA} is no table of texts")
    spans = sorted((_span(path, name, raw, size) for name, raw in content.items()), key=lambda span: span[1:])
    at = 0
    for entry, begin, end in spans:
        if begin < at:
            _refuse(path, f"the bytes of {entry.name!r} overlap those of the tensor before it")
        if begin > at:
            _refuse(path, f"{begin - at} bytes before {entry.name!r} belong to no tensor")
        at = end
    if at != size - len(header):
        missing = at - (size - len(header))
        _refuse(
            path, f"it is {abs(missing)} bytes too {'short' if missing > 0 else 'long'} for its header: copy it again"
        )
    data = len(header)
    entries = (Entry(e.name, e.dtype, e.shape, data + begin) for e, begin, _ in spans)
    return Layout(header, metadata, tuple(entries), size)


def _span(path: Path, name: str, raw: object, size: int) -> tuple[Entry, int, int]:
    """The tensor's entry and its (begin, end) after the header, each believed only once checked."""
    if not is_name(name):
        _refuse(path, f"{short(repr(name), 80)} is no name for a tensor")
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"the entry of {name!r} is not made of dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse(path, f"{name!r} has the dtype {short(repr(dtype), 80)}, which this version does not know")
    if not _naturals(shape, size) or not _naturals(offsets, size) or len(offsets) != 2:
        place = f"shape {short(repr(shape), 80)} at offsets {short(repr(offsets), 80)}"
        _refuse(path, f"{name!r} has {place}, which do not lie in the file")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if begin > end or bits % 8 or end - begin != bits // 8:
        _refuse(path, f"{name!r} of dtype {dtype} and shape {shape} does not fit its offsets {offsets}")
    return Entry(name, dtype, tuple(shape), 0), begin, end


def _naturals(value: object, most: int) -> bool:
    """True for a short list of whole numbers from 0 to `most`: no tensor in a file has a dimension above its bytes."""
    if not isinstance(value, list) or len(value) > 64:
        return False
    return all(type(number) is int and 0 <= number <= 8 * most for number in value)


def _is_text(value: object) -> bool:
    """True for a text that has a UTF-8 form, which JSON's escapes can miss."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
