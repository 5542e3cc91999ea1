"""Stored forms in files are read by rows: what is read, how much of it, and a file that another program cuts short."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank.errors import CheckpointError
from lowrank.modelfiles.base import read_base
from lowrank.modelfiles.tensors import Form, PackedForm, PackedStack, ReadInto, StoredEntry
from lowrank.modelfiles.workspace import Workspace
from merge_disk_models import linear_factors, write_adapter

Q = "layers.0.q_proj"
D, K = 200, 132  # rows fill no block of 64, and the last blocks are cut
FP8 = torch.float8_e4m3fn


def four_bits(block: int, nested: int = 0, dtype: str = "bfloat16") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Packed numbers and their scales, which are quantised too where `nested` says their block."""
    blocks = -(-D * K // block)
    said: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": dtype, "shape": [D, K]}
    tensors = {"": torch.randint(0, 256, (D * K // 2, 1)).byte(), ".quant_map": torch.linspace(-1, 1, 16)}
    tensors[".absmax"] = torch.rand(blocks) + 0.1
    if nested:
        said |= {"nested_blocksize": nested, "nested_offset": 0.3}
        tensors[".absmax"] = torch.randint(0, 256, (blocks,)).byte()
        tensors |= {".nested_absmax": torch.rand(-(-blocks // nested)), ".nested_quant_map": torch.linspace(-1, 1, 256)}
    tensors[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(said).encode())).byte()
    return {f"{Q}.weight{end}": tensor for end, tensor in tensors.items()}, {"quant_method": "bitsandbytes"}


def scaled(
    dtype: torch.dtype, grid: tuple[int, ...], zero: bool = False, **said: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    numbers = torch.randn(D, K).mul(50).clamp(-127, 127).to(dtype)
    tensors = {f"{Q}.weight": numbers, f"{Q}.weight_scale": torch.rand(grid) * 1e-3}
    if zero:
        tensors[f"{Q}.weight_zero_point"] = torch.randint(-9, 9, grid).to(torch.int8)
    return tensors, {"quant_method": "compressed-tensors"} | said


def int8() -> tuple[dict[str, Tensor], dict[str, Any]]:
    numbers = torch.randint(-127, 128, (D, K)).to(torch.int8)
    return {f"{Q}.weight": numbers, f"{Q}.SCB": torch.rand(D)}, {"quant_method": "bitsandbytes"}


def mxfp4() -> tuple[dict[str, Tensor], dict[str, Any]]:
    name = "layers.0.experts.down_proj"
    blocks, scales = torch.randint(0, 256, (5, 40, 3, 16)), torch.randint(115, 130, (5, 40, 3))
    return {f"{name}_blocks": blocks.byte(), f"{name}_scales": scales.byte()}, {"quant_method": "mxfp4"}


def fp8_stack() -> tuple[dict[str, Tensor], dict[str, Any]]:
    name = "layers.0.experts.gate_up_proj"
    tensors = {name: torch.randn(5, 72, 64).mul(100).to(FP8), f"{name}_scale_inv": torch.rand(5, 3, 2)}
    return tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]}


FORMS = {
    "four bits": lambda: four_bits(64),
    "four bits, large blocks": lambda: four_bits(1024),
    "four bits, double": lambda: four_bits(64, 7),
    "int8 rows": int8,
    "one scale": lambda: scaled(FP8, ()),
    "channels": lambda: scaled(torch.int8, (D, 1)),
    "groups": lambda: scaled(torch.int8, (D, 12), zero=True),
    "blocks": lambda: scaled(FP8, (7, 5), weight_block_size=[32, 32]),
    "tall blocks": lambda: scaled(FP8, (2, 1), zero=True),
    "MXFP4": mxfp4,
    "stack of blocks": fp8_stack,
}


def write(folder: Path, form: str) -> Path:
    """A base with one weight in the form, and a plain one, each of several pages."""
    tensors, said = FORMS[form]()
    folder.mkdir(parents=True)
    plain = {f"{Q.replace('q', 'k')}.weight": torch.randn(D, K).bfloat16()}
    save_file(tensors | plain, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": said, "dtype": "bfloat16"}))
    return folder


def form_in(folder: Path) -> tuple[Form, int]:
    """(the one form, how many rows it has)."""
    (entry,) = (entry for _, entry in read_base(folder).tensors.values() if isinstance(entry, StoredEntry))
    return entry.form, entry.shape[0]


def pieces(count: int) -> Iterator[slice]:
    """All, none, each end, and some rows in the middle that begin and end anywhere in a block."""
    yield from (slice(0, count), slice(1, 1), slice(0, 1), slice(count - 1, count))
    yield from (slice(first, min(first + step, count)) for first in (1, 2, 31, 63, 99) for step in (1, 2, 33, 70))


@pytest.mark.parametrize("name", FORMS)
def test_some_rows_are_those_of_the_whole(name, tmp_path):
    form, count = form_in(write(tmp_path / "base", name))
    if isinstance(form, PackedForm):
        whole = form.stored().matrix()
    else:
        assert isinstance(form, PackedStack)
        experts = [expert.matrix() for expert in form.unstacked({})]
        whole = torch.stack([(one.t() if form.transposed else one).flatten() for one in experts])
    assert whole.shape[0] == count and whole.isfinite().all() and whole.count_nonzero() > 0
    for rows in pieces(count):
        if rows.start < rows.stop or not isinstance(form, PackedStack):
            some = form.rows(rows)
            assert some.dtype is whole.dtype and torch.equal(some, whole[rows.start : rows.stop]), rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("nested", [0, 7])
def test_rows_in_memory_that_is_used_again_hold_until_the_role_is_read_anew(nested, dtype, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, "this", lambda: four_bits(64, nested, dtype))
    form, count = form_in(write(tmp_path / "base", "this"))
    assert isinstance(form, ReadInto)
    workspace, first = Workspace(), form.rows(slice(0, 9))
    kept = form.rows_into(slice(0, 9), workspace, "kept")
    for rows in pieces(count):
        assert torch.equal(form.rows_into(rows, workspace, "other"), form.rows(rows)), rows
    assert torch.equal(kept, first)
    again = form.rows_into(slice(9, 18), workspace, "kept")
    assert again.data_ptr() == kept.data_ptr() and torch.equal(again, form.rows(slice(9, 18)))


@pytest.mark.parametrize("name", FORMS)
def test_no_more_is_read_than_the_rows_take(name, tmp_path, monkeypatch):
    """A row's share of the parts, and of four bits the blocks that it begins and ends in: memory stays flat."""
    form, count = form_in(write(tmp_path / "base", name))
    read: list[int] = []
    from lowrank.modelfiles import blocks

    honest = blocks.read_into

    def counted(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
        read.append(len(view))
        honest(descriptor, view, offset, path)

    monkeypatch.setattr(blocks, "read_into", counted)
    form.rows(slice(count - 1, count))
    parts = sum(part.entry.nbytes for role, part in form.parts.items() if role != "state")
    tables = sum(part.entry.nbytes for role, part in form.parts.items() if role.endswith("quant_map"))
    assert 0 < sum(read) <= tables + parts / count + 1024


@pytest.mark.parametrize("blocks", [torch.zeros(5, 40, 3, 16), torch.zeros(5, 40, 3, 8).byte(), torch.zeros(4).byte()])
def test_blocks_that_are_none_are_said(blocks, tmp_path):
    tensors, said = mxfp4()
    name = next(name for name in tensors if name.endswith("_blocks"))
    save_file(tensors | {name: blocks}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    with pytest.raises(CheckpointError, match=r"down_proj_blocks is \w+ of shape .*, wanted U8"):
        read_base(tmp_path)


CUT = """
import os, sys
from pathlib import Path
from lowrank.cli import main
from lowrank.modelfiles import base as opening

find, cut = opening.find_forms, set()

def reading(form, shard, name):
    read = getattr(form, name)

    def rows(wanted, *memory):
        if shard.path not in cut:
            read(slice(0, 1), *memory)  # whatever is kept of a file from the first row on is kept now
            os.truncate(shard.path, len(shard.layout.header))
            cut.add(shard.path)
        return read(wanted, *memory)

    return rows

def then_cut(tensors, config):
    found = find(tensors, config)
    for shard, entry in ((source.shard, source.entry) for source in found.values()):
        if shard.path.parent.name == "base" and hasattr(entry, "form"):
            for name in ("rows", "rows_into"):
                if hasattr(entry.form, name):
                    setattr(entry.form, name, reading(entry.form, shard, name))
    return found

opening.find_forms = then_cut
for folder in map(Path, sys.argv[1:]):
    os.chdir(folder)
    whole, target = Path("base/model.safetensors").read_bytes(), ["--adapter", "adapter"]
    for number, command in enumerate([
        ["merge", "--model", "base", *target, "--out", "out", "--onto", "16bit"],
        ["merge", "--model", "base", *target, "--out", "out", "--onto", "quantised"],
        ["inspect", "adapter", "--model", "base"],
        ["extract", "--model", "base", "--tuned", "tuned", "--out", "out", "--rank", "2"],
    ]):
        print("called", folder.name, number, main(command), flush=True)
        Path("base/model.safetensors").write_bytes(whole)
        cut.clear()
"""


def test_a_file_cut_short_after_it_was_opened_is_an_error_of_every_form(tmp_path):
    """In a process of its own: a mapped file would end it by a signal."""
    folders = []
    for name in FORMS:
        folders.append(tmp_path / name.replace(" ", "_").replace(",", ""))
        write(folders[-1] / "base", name)
        write(folders[-1] / "tuned", name)
        path, d = (Q, D) if isinstance(form_in(folders[-1] / "base")[0], PackedForm) else (Q.replace("q", "k"), D)
        write_adapter(folders[-1] / "adapter", linear_factors(path, d, K))
    process = subprocess.run([sys.executable, "-c", CUT, *map(str, folders)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    calls = [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("called ")]
    errors = [line for line in process.stderr.splitlines() if line.startswith("lowrank: error: ")]
    assert len(calls) == 4 * len(FORMS) and len(errors) == sum(status == "2" for *_, status in calls)
    short = iter(["became shorter while it was read" in error for error in errors])
    told = {(form, number) for form, number, status in calls if status == "2" and next(short)}
    unread = {(form, number) for form in ("MXFP4", "stack_of_blocks") for number in "12"}  # they are not asked there
    assert told == {(form, number) for form, number, _ in calls} - unread, process.stderr
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "tuned"]
