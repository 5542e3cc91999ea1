"""The GGUF container, version 3: numbers and names in front, then the tensors, each at a multiple of 32 bytes.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Little-endian; dimensions are listed fastest first.
Only what adapters need: float32, float16 and bfloat16 tensors; all kinds of values can be read.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.errors import CheckpointError, short
from lowrank.files.names import is_name
from lowrank.files.regular import read_bytes

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
DTYPES = {number: dtype for dtype, number in TYPES.items()}
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
MOST = 2**20  # tensors, values or elements of a list: far above any adapter's


@dataclass(frozen=True, slots=True)
class Gguf:
    """values: {key: number, text, or list of these}; tensors in torch's order of dimensions."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def gguf_bytes(values: Mapping[str, str | int | float], tensors: Mapping[str, Tensor]) -> bytes:
    """The file's content: texts, ints as uint32 and floats as float32; tensors of the dtypes in TYPES."""
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(values)))
    for key, value in values.items():
        head += _text(key) + _value(value)
    offset = 0
    for name, tensor in tensors.items():
        shape = tuple(reversed(tensor.shape))
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", TYPES[tensor.dtype], offset)
        offset += _padded(tensor.numel() * tensor.dtype.itemsize)
    body = bytearray(head.ljust(_padded(len(head)), b"\0"))
    for tensor in tensors.values():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        body += data.ljust(_padded(len(data)), b"\0")
    return bytes(body)


def _padded(size: int) -> int:
    return -size // ALIGNMENT * -ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    return struct.pack("<If", FLOAT32, value)


def read_gguf(path: Path) -> Gguf:
    """The whole file. Raises CheckpointError where it is truncated, of another version, or quantised."""
    try:
        return _read(_Cursor(path, read_bytes(path)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _read(cursor: "_Cursor") -> Gguf:
    path = cursor.path
    if cursor.take(4) != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file")
    version, tensor_count, value_count = cursor.unpack("IQQ")
    if version not in (2, 3):
        raise CheckpointError(f"{path} has GGUF version {version}, and versions 2 and 3 can be read")
    cursor.check_count(tensor_count)
    cursor.check_count(value_count)
    values = {cursor.text(): cursor.value() for _ in range(value_count)}
    entries = [cursor.entry() for _ in range(tensor_count)]
    alignment = values.get("general.alignment", ALIGNMENT)
    start = -cursor.at // alignment * -alignment if isinstance(alignment, int) and alignment > 0 else cursor.at
    _check_entries(path, entries)
    return Gguf(values, {entry.name: cursor.tensor(entry, start) for entry in entries})


def _check_entries(path: Path, entries: Sequence["_Entry"]) -> None:
    """Raise for tensors that share bytes: a few bytes of a file must not become many of memory."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.offset < end:
            raise CheckpointError(f"{path}: {entry.name} lies on the bytes of another tensor: the file is damaged")
        end = entry.offset + entry.nbytes
    if len({entry.name for entry in entries}) < len(entries):
        raise CheckpointError(f"{path} holds two tensors of one name: the file is damaged")


class _Cursor:
    """Reads one thing after another, and never beyond the end."""

    def __init__(self, path: Path, data: bytearray) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int) -> bytearray:
        """The next `count` bytes."""
        if count > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path} ends in the middle of something, at byte {len(self.data)}: copy it again"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form: str) -> tuple[Any, ...]:
        """Numbers by a format of `struct`."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def check_count(self, count: int) -> None:
        """Raise for a count that cannot be meant."""
        if count > MOST:
            raise CheckpointError(f"{self.path} claims to hold {count} of something: it is damaged, or no adapter")

    def text(self) -> str:
        """A string with its length in front."""
        try:
            return self.take(self.unpack("Q")[0]).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} holds a name that is no text: it is damaged") from error

    def value(self) -> Any:
        """A value with its type in front."""
        return self._typed(self.unpack("I")[0])

    def _typed(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY and depth == 0:
            inner, count = self.unpack("IQ")
            self.check_count(count)
            return [self._typed(inner, depth + 1) for _ in range(count)]
        if kind not in NUMBERS:
            raise CheckpointError(f"{self.path} holds a value of type {kind}, which this version does not know")
        return self.unpack(NUMBERS[kind])[0]

    def entry(self) -> "_Entry":
        """What the file says of a tensor."""
        name, dimensions = self.text(), self.unpack("I")[0]
        if not is_name(name):
            raise CheckpointError(f"{self.path} holds a tensor called {short(repr(name), 80)}: it is damaged")
        if not 1 <= dimensions <= 4:
            raise CheckpointError(f"{self.path}: {name} has {dimensions} dimensions: the file is damaged")
        shape = tuple(reversed(self.unpack(f"{dimensions}Q")))
        if min(shape) < 1 or max(shape) > len(self.data):
            raise CheckpointError(f"{self.path}: {name} has the shape {list(shape)}: the file is damaged")
        return _Entry(name, shape, *self.unpack("IQ"))

    def tensor(self, entry: "_Entry", start: int) -> Tensor:
        """A tensor's values, copied; start: where the first tensor begins."""
        dtype = DTYPES.get(entry.kind)
        if dtype is None:
            raise CheckpointError(f"{self.path}: {entry.name} is quantised (type {entry.kind}), not of floats")
        self.at = start + entry.offset
        return torch.frombuffer(self.take(entry.nbytes), dtype=dtype).view(*entry.shape)


class _Entry(NamedTuple):
    """A tensor in the file: kind is the number of its type, offset counts from the first tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def nbytes(self) -> int:
        """The tensor's length in the file; of a quantised one, no more than 0, for it is refused."""
        dtype = DTYPES.get(self.kind)
        return math.prod(self.shape) * dtype.itemsize if dtype else 0
