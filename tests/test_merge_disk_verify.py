"""Verification finds what is wrong before the result gets its name, and tells what rounding leaves of ΔW."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowrank.merge.disk.merge as merge
from lowrank.errors import LowrankWarning, MergeError
from lowrank.files.safetensors import DTYPES, read_layout
from lowrank.merge.disk import MergeReport, merge_checkpoint
from lowrank.merge.disk.exact import ExactRows
from lowrank.merge.disk.recipe import Recipe
from lowrank.modelfiles import bytes
from merge_disk_models import linear_factors, tensors_of, write_adapter, write_base

Q = "layers.0.q_proj"
SHAPES = {f"{Q}.weight": (64, 40), "norm.weight": (64,), "head.weight": (3000, 40)}


def files(
    tmp_path: Path, dtype: torch.dtype = torch.bfloat16, size: float = 1.0, **config: object
) -> tuple[Path, Path]:
    base = write_base(tmp_path / "base", SHAPES, {"model_type": "llama"}, dtype)
    factors = {key: value * size for key, value in linear_factors(Q, 64, 40).items()}
    return base, write_adapter(tmp_path / "adapter", factors, **config)


def damage_before_verification(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Let `damage` change the written file before the real verification looks at it."""
    real = merge.verify_files

    def verify(folder: Path, *arguments: object, **options: object) -> object:
        damage(folder / "model.safetensors")
        return real(folder, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "verify_files", verify)


def flip(path: Path, tensor: str, byte: int, bit: int) -> None:
    entry = next(e for e in read_layout(path).entries if e.name == tensor)
    with open(path, "r+b") as file:
        file.seek(entry.offset + byte % entry.nbytes)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytearray([value ^ (1 << bit)]))


@pytest.mark.parametrize("tensor", [f"{Q}.weight", "norm.weight", "head.weight"])
@pytest.mark.parametrize(("byte", "bit"), [(0, 0), (1, 6), (1001, 7), (-2, 0), (777, 1)])
def test_full_finds_any_flipped_bit(
    tensor: str, byte: int, bit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even the last bit of a merged bfloat16: it is then no longer the nearest."""
    base, adapter = files(tmp_path)
    damage_before_verification(monkeypatch, lambda path: flip(path, tensor, byte, bit))
    with pytest.raises(MergeError, match="verification"):
        merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


@pytest.mark.parametrize("tensor", [f"{Q}.weight", "head.weight"])
def test_a_sample_finds_a_tensor_that_was_not_written(
    tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def erase(path: Path) -> None:
        entry = next(e for e in read_layout(path).entries if e.name == tensor)
        with open(path, "r+b") as file:
            file.seek(entry.offset)
            file.write(bytearray(entry.nbytes))

    base, adapter = files(tmp_path)
    damage_before_verification(monkeypatch, erase)
    with pytest.raises(MergeError, match=tensor.replace(".", r"\.")):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sample_finds_a_wrong_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic that drops a term: the oracle has none in common with it."""
    import lowrank.merge.disk.write as write

    real = write.make_changes

    def wrong(recipe: object) -> tuple[object, ...]:
        from dataclasses import replace

        return tuple(replace(change, scale=change.scale * 1.01) for change in real(recipe))  # type: ignore[arg-type]

    monkeypatch.setattr(write, "make_changes", wrong)
    base, adapter = files(tmp_path, torch.float32)
    with pytest.raises(MergeError, match="within one rounding"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_the_wrong_header_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = files(tmp_path)

    def rename_tensor(path: Path) -> None:
        path.write_bytes(path.read_bytes().replace(b"norm.weight", b"nomr.weight"))

    damage_before_verification(monkeypatch, rename_tensor)
    with pytest.raises(MergeError, match="does not hold the tensors"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_change_that_rounding_swallows_is_told(tmp_path: Path) -> None:
    """ΔW of a ten-thousandth of the weights is gone in bfloat16, and whole in float32."""
    base, adapter = files(tmp_path, size=1e-3)
    with pytest.warns(LowrankWarning, match=r"lose more than half of ‖ΔW‖² in rounding to BF16.*--dtype float32"):
        report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert report.surviving[f"{Q}.weight"] < 0.1
    wide = merge_checkpoint(base, adapter, tmp_path / "wide", dtype="float32", verify="full")
    assert wide.surviving[f"{Q}.weight"] > 0.999 and not wide.warnings


def test_the_share_that_survives_is_that_of_the_tensors(tmp_path: Path) -> None:
    """Over all rows, 1 − ‖W − (W0 + ΔW)‖² / ‖ΔW‖², in float64."""
    base, adapter = files(tmp_path, size=0.05)
    report = merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    factors = linear_factors(Q, 64, 40)
    delta = 1.5 * (0.05**2) * factors[f"{Q}.lora_B.weight"].double() @ factors[f"{Q}.lora_A.weight"].double()
    before, after = (tensors_of(folder)[f"{Q}.weight"].double() for folder in (base, tmp_path / "out"))
    share = 1 - (after - before - delta).square().sum() / delta.square().sum()
    assert report.surviving[f"{Q}.weight"] == pytest.approx(float(share), abs=1e-6)
    assert 0.5 < share < 0.999


def test_the_report_counts_and_prints(tmp_path: Path) -> None:
    base, adapter = files(tmp_path)
    report = merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    assert isinstance(report, MergeReport)
    assert (report.merged, report.replaced, report.moved, report.rows) == (1, 0, 2, 64)
    assert 0 < report.worst <= 1
    assert report.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "1 tensors merged" in str(report) and "verified" in str(report)


def test_the_card_has_the_hashes_and_no_path(tmp_path: Path) -> None:
    import hashlib

    base, adapter = files(tmp_path, base_model_name_or_path="somebody/model")
    merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    card = (tmp_path / "out" / "README.md").read_text()
    for path in (adapter / "adapter_model.safetensors", base / "config.json", tmp_path / "out" / "model.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert 'base_model: "somebody/model"' in card and "`adapter`" in card
    assert str(tmp_path) not in card


def test_side_files_come_along(tmp_path: Path) -> None:
    """Tokenizer, templates, licence and one level of folders; no weights in other formats, no card, nothing hidden."""
    base, adapter = files(tmp_path)
    kept = {
        "tokenizer.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "generation_config.json",
    }
    left = {"README.md", "pytorch_model.bin", "model.gguf", ".gitattributes", "training_args.bin", "tf_model.h5"}
    for name in kept | left:
        (base / name).write_text(name)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_text("x")
    merge_checkpoint(base, adapter, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == kept | {"config.json", "model.safetensors", "README.md", "1_Pooling/config.json"}
    assert all((tmp_path / "out" / name).read_text() == name for name in kept)


def test_a_tokenizer_of_the_adapters_own_is_noted(tmp_path: Path) -> None:
    base, adapter = files(tmp_path)
    for folder, text in ((base, "a"), (adapter, "b")):
        (folder / "tokenizer.json").write_text(text)
        (folder / "chat_template.jinja").write_text("same")
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "a"
    assert [note for note in report.notes if "has a tokenizer.json that" in note and "jinja" not in note]


@pytest.mark.parametrize("how", ["hardlink", "reflink"])
def test_untouched_files_may_be_shared(how: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, adapter = files(tmp_path)
    tensors = tensors_of(base)
    (base / "model.safetensors").unlink()
    table = {}
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, base / f"{number}.safetensors", metadata={"format": "pt"})
        table[name] = f"{number}.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    report = merge_checkpoint(base, adapter, tmp_path / "out", untouched=how, verify="full")
    shared = {table["norm.weight"], table["head.weight"]}
    for name in sorted(table.values()):
        assert os.path.samefile(base / name, tmp_path / "out" / name) == (how == "hardlink" and name in shared)
    if report.linked:
        assert set(report.linked) == shared
    else:
        assert how == "reflink" and any("copied" in note for note in report.notes)
    merge_checkpoint(base, adapter, tmp_path / "copied")
    copied, found = tensors_of(tmp_path / "copied"), tensors_of(tmp_path / "out")
    assert copied.keys() == found.keys() and all(torch.equal(copied[name], found[name]) for name in copied)


def test_without_help_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that declines copy_file_range, at once or halfway, gives the same bytes."""
    base, adapter = files(tmp_path)
    merge_checkpoint(base, adapter, tmp_path / "out")
    monkeypatch.setattr(bytes, "CHUNK", 1000)
    for number, code in enumerate((18, 38, 95)):

        def decline(*arguments: int, code: int = code) -> int:
            if code == 38 and arguments[2] > 5000:
                return os.sendfile(arguments[1], arguments[0], arguments[3], 0) + 0  # nothing: the source has ended
            raise OSError(code, "declined")

        monkeypatch.setattr(os, "copy_file_range", decline)
        merge_checkpoint(base, adapter, tmp_path / f"out{number}")
        result = (tmp_path / f"out{number}" / "model.safetensors").read_bytes()
        assert result == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_source_that_shrinks_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = files(tmp_path)
    real = merge.write_files

    def shrink(*arguments: object, **options: object) -> None:
        os.truncate(base / "model.safetensors", 5000)
        real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "write_files", shrink)
    with pytest.raises(Exception, match="became shorter"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("word", "digits", "least"), [("F16", 11, -24), ("BF16", 8, -133), ("F32", 24, -149)])
def test_half_an_ulp_is_half_the_distance_of_neighbours(word: str, digits: int, least: int) -> None:
    values = [m * 2.0**e for e in range(least - 3, 15) for m in (1.0, 1.5, 2 - 2**-52)]
    half_ulps = [2.0 ** (max(math.frexp(value)[1] - digits, least) - 1) for value in values]
    found = ExactRows(Recipe("w", word, (8, 8), replacement=torch.empty(0, dtype=DTYPES[word])))._half_ulp(
        torch.tensor([0.0, *values], dtype=torch.float64)
    )
    assert found.tolist() == [2.0 ** (least - 1), *half_ulps]
