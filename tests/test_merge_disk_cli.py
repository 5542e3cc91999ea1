"""`lowrank merge` from the shell: what it prints, where, and with which status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank.cli import main
from lowrank.errors import LowrankError
from lowrank.merge.disk import merge_checkpoint
from merge_disk_models import linear_factors, tensors_of, write_adapter, write_base

Q, K = "layers.0.q_proj", "layers.0.k_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", {f"{Q}.weight": (6, 4), f"{K}.weight": (6, 4)}, {"model_type": "llama"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", linear_factors(Q, 6, 4))


def test_one_adapter(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "1 tensors merged" in printed.out and "verified" in printed.out
    assert printed.err == ""
    merge_checkpoint(base, adapter, tmp_path / "library")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "library/model.safetensors").read_bytes()


def test_weights_dtype_and_json(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_adapter(tmp_path / "with:0.5", linear_factors(K, 6, 4, seed=2), target_modules=["k_proj"])
    flags = [
        "--adapter",
        f"{adapter}:-0.5",
        "--adapter",
        str(other),
        "--dtype",
        "float64",
        "--verify",
        "full",
        "--json",
    ]
    assert main(["merge", "--model", str(base), "--out", str(tmp_path / "out"), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["merged"], report["rows"], report["out"]) == (2, 12, str(tmp_path / "out"))
    merge_checkpoint(base, [(adapter, -0.5), other], tmp_path / "library", dtype=torch.float64)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "library/model.safetensors").read_bytes()
    assert tensors_of(tmp_path / "out")[f"{Q}.weight"].dtype == torch.float64


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--adapter", "ADAPTER:much", "--out", "OUT"], "'much' after the colon is no weight"),
        (["--adapter", "ADAPTER", "--out", "BASE"], "is the base model itself"),
        (["--adapter", "ADAPTER"], "out"),
        (["--adapter", "ADAPTER", "--out", "OUT", "--verify", "none"], "verify"),
        (["--adapter", "ADAPTER", "--out", "OUT", "--dtype", "int4"], "dtype must be one of"),
        (["--adapter", "nowhere", "--out", "OUT"], "no folder nowhere"),
    ],
)
def test_wrong_calls(
    flags: list[str], why: str, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one line on stderr, nothing written."""
    places = {"ADAPTER": str(adapter), "OUT": str(tmp_path / "out"), "BASE": str(base)}
    for word, place in places.items():
        flags = [flag.replace(word, place) for flag in flags]
    assert main(["merge", "--model", str(base), *flags]) == 2
    printed = capsys.readouterr()
    assert why in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "out").exists()


def test_a_warning_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", {f"{Q}.weight": (6, 4)}, {"model_type": "llama"}, torch.bfloat16)
    small = {key: value * 1e-3 for key, value in linear_factors(Q, 6, 4).items()}
    adapter = write_adapter(tmp_path / "adapter", small)
    assert main(["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("lowrank: warning: 1 of 1 merged tensors lose more than half")
    assert printed.err.count("\n") == 1 and "warning:" not in printed.out


def test_an_adapter_that_may_not_be_whole_is_noted(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", linear_factors(Q, 6, 4), target_modules=["q_proj", "k_proj"], new=1)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert any(f"target_modules names {K}.weight too" in note for note in report.notes)
    assert any("not understood: new" in note for note in report.notes)


def test_the_way_out_of_pickles(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A base of .bin files is refused with a command; the command works, and its result merges."""
    torch.save(tensors_of(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(LowrankError, match="lowrank convert --source") as caught:
        merge_checkpoint(base, adapter, tmp_path / "out")
    words = str(caught.value).split("`")[1].replace("NEW", str(tmp_path / "new")).split()
    assert words[0] == "lowrank"
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    report = merge_checkpoint(tmp_path / "new", adapter, tmp_path / "out")
    assert report.merged == 1
