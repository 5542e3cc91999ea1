"""The safetensors header: what we write anyone reads, and what we accept is whole."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lowrank.errors import CheckpointError
from lowrank.files.safetensors import BITS, DTYPES, build_layout, read_layout

names = st.text("abc.ß日0_ -", min_size=1, max_size=12).filter(str.isprintable)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensors = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6)
metadata = st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


def write(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """A file of this header, and of this length field where it should lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@given(tensors, metadata)
def test_written_headers_are_read_back_by_us_and_by_safetensors(
    tmp_path: Path, content: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    layout = build_layout(((name, dtype, shape) for name, (dtype, shape) in content.items()), metadata)
    path = tmp_path / "a.safetensors"
    path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    read = read_layout(path)
    assert sorted(read.entries, key=lambda e: e.name) == sorted(layout.entries, key=lambda e: e.name)
    assert (read.header, read.metadata, read.size) == (layout.header, layout.metadata, layout.size)
    assert len(layout.header) % 8 == 0
    with safe_open(path, "pt") as theirs:
        assert {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()} == {  # noqa: SIM118
            name: shape for name, (_, shape) in content.items()
        }
        assert (theirs.metadata() or {}) == (metadata or {})


@given(tensors)
def test_what_safetensors_writes_is_read(tmp_path: Path, content: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    path = tmp_path / "a.safetensors"
    values = {name: torch.ones(shape).to(DTYPES[dtype]) for name, (dtype, shape) in content.items()}
    save_file(values, path)
    data = path.read_bytes()
    read = read_layout(path)
    assert {e.name: (e.dtype, e.shape) for e in read.entries} == content
    for e in read.entries:
        stored = torch.frombuffer(
            bytearray(data[e.offset : e.offset + e.nbytes]) or bytearray(8), dtype=DTYPES[e.dtype]
        )
        assert torch.equal(stored[: values[e.name].numel()], values[e.name].flatten())


def _valid(path: Path) -> bytes:
    layout = build_layout([("a", "BF16", (2, 3)), ("b.weight", "F32", (2,)), ("c", "I64", ())], {"format": "pt"})
    path.write_bytes(layout.header + bytes(range(layout.size - len(layout.header))))
    return path.read_bytes()


@given(st.data())
def test_a_damaged_file_is_refused_or_still_whole(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes changed, cut off or put in: what we still accept, the format's own reader accepts as well."""
    path = tmp_path / "a.safetensors"
    content = bytearray(_valid(path))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert", "digit"]))
        if kind == "cut":
            del content[at : at + data.draw(st.integers(1, 8))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "digit" and content[at : at + 1].isdigit():
            content[at] = data.draw(st.sampled_from(b"0123456789-"))
        else:
            content[at] = data.draw(st.integers(0, 255))
        if not content:
            break
    path.write_bytes(content)
    try:
        read = read_layout(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    with safe_open(path, "pt") as theirs:
        assert {e.name: e.shape for e in read.entries} == {
            name: tuple(theirs.get_slice(name).get_shape())
            for name in theirs.keys()  # noqa: SIM118  it is no mapping
        }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4), st.binary(max_size=32))
def test_any_json_is_refused_or_right(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    path = write(tmp_path / "a.safetensors", header, data)
    try:
        entries = read_layout(path).entries
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert not entries or all(e.dtype in BITS for e in entries)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "short length": (b"\x01\x00\x00", "truncated"),
    "length beyond the file": (struct.pack("<Q", 100) + b"{}", "truncated"),
    "length beyond all files": (struct.pack("<Q", 2**63) + b"{}", "truncated"),
    "no json": (struct.pack("<Q", 4) + b"{a:1", "not valid JSON"),
    "no object": (struct.pack("<Q", 2) + b"[]", "begin with"),
    "not utf-8": (struct.pack("<Q", 4) + b'{"\xff"', "not valid JSON"),
    "nested beyond reason": (struct.pack("<Q", 200_006) + b'{"a":' + b"[" * 200_001, "not valid JSON"),
    "a number beyond reason": (struct.pack("<Q", 9006) + b'{"a":' + b"1" * 9000 + b"}", "not valid JSON"),
    "NaN": (struct.pack("<Q", 9) + b'{"a":NaN}', "not made of dtype"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(64), "truncated"),
    "a zip": (b"PK\x03\x04" + bytes(64), "truncated"),
}
WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "overlap"),
    "gap": ({"a": entry(0, 2), "b": entry(4, 6)}, 6, "belong to no tensor"),
    "gap at the start": ({"a": entry(2, 4)}, 4, "belong to no tensor"),
    "bytes left over": ({"a": entry(0, 4)}, 6, "too long"),
    "beyond the end": ({"a": entry(0, 8)}, 4, "too short"),
    "far beyond the end": ({"a": entry(0, 2**60)}, 4, "do not lie in the file"),
    "backwards": ({"a": entry(4, 0, [4])}, 4, "does not fit"),
    "negative": ({"a": entry(-4, 0, [4])}, 4, "do not lie in the file"),
    "shape too large": ({"a": entry(0, 4, [5])}, 4, "does not fit"),
    "shape overflow": ({"a": entry(0, 4, [2**31, 2**31, 4])}, 4, "do not lie in the file"),
    "fractional shape": ({"a": entry(0, 4, [4.0])}, 4, "do not lie in the file"),
    "boolean shape": ({"a": entry(0, 1, [True])}, 1, "do not lie in the file"),
    "shape of a thousand dimensions": ({"a": entry(0, 1, [1] * 1000)}, 1, "do not lie in the file"),
    "unknown dtype": ({"a": entry(0, 4, [4], "Q4")}, 4, "does not know"),
    "dtype no text": ({"a": entry(0, 4, [4], 7)}, 4, "does not know"),  # type: ignore[arg-type]
    "half a byte": ({"a": entry(0, 1, [1], "F4")}, 1, "does not fit"),
    "one offset": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, 1, "do not lie"),
    "a field too many": ({"a": entry(0, 1) | {"x": 1}}, 1, "not made of"),
    "a field too few": ({"a": {"dtype": "U8", "shape": [1]}}, 1, "not made of"),
    "no entry": ({"a": 3}, 0, "not made of"),
    "no name": ({"": entry(0, 1)}, 1, "no name"),
    "a name with a line break": ({"a\nb": entry(0, 1)}, 1, "no name"),
    "metadata no table": ({"__metadata__": [1]}, 0, "no table of texts"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "no table of texts"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes(case: str, tmp_path: Path) -> None:
    content, why = HOSTILE[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        read_layout(path)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_entries(case: str, tmp_path: Path) -> None:
    header, size, why = WRONG[case]
    with pytest.raises(CheckpointError, match=why):
        read_layout(write(tmp_path / "a.safetensors", header, bytes(size)))


def test_a_name_given_twice(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 1))
    with pytest.raises(CheckpointError, match="names 'a' twice"):
        read_layout(write(tmp_path / "a.safetensors", f'{{"a":{one},"a":{one}}}'.encode(), b"x"))


def test_a_header_above_the_limit_is_not_read(tmp_path: Path) -> None:
    """A sparse file whose length field claims more than the format allows."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 200_000_000))
    with open(path, "r+b") as file:
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="above the format's limit"):
        read_layout(path)


def test_tensors_of_no_bytes_and_odd_widths(tmp_path: Path) -> None:
    header = {"z": entry(4, 4, [0, 7], "F32"), "a": entry(0, 1, [2], "F4"), "b": entry(1, 4, [4], "F6_E2M3")}
    read = read_layout(write(tmp_path / "a.safetensors", header, bytes(4)))
    assert [(e.name, e.nbytes) for e in read.entries] == [("a", 1), ("b", 3), ("z", 0)]
