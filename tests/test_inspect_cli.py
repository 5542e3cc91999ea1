"""`lowrank inspect`: what is printed, and what a wrong call or a bad file gets."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint_models as models
from lowrank.analysis import inspect_adapter
from lowrank.cli import main
from merge_disk_models import save_adapter, save_base

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, adapters of it, and an adapter and base of other sizes."""
    folder = tmp_path_factory.mktemp("inspect")
    model = models.llama()
    save_base(model, folder / "base")
    save_adapter(model, folder / "one", r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    save_adapter(model, folder / "other", seed=2, r=4, lora_alpha=2, target_modules=["q_proj", "up_proj"])
    save_adapter(model, folder / "apart", r=2, target_modules=["gate_proj"])
    save_base(models.bert(), folder / "bert")
    small = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([_block(8), _block(8)])})})
    save_adapter(small, folder / "smaller", r=2, target_modules=["q_proj"])
    return folder


def _block(width: int) -> nn.Module:
    return nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(width, width)})})


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence that a refused call prints."""
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("lowrank: error: ") and err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_sentences_then_a_row_for_every_module(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, made / "one")
    assert (status, err) == (0, "")
    assert out.startswith("Rank 3 was given to 4 modules (down_proj, q_proj) at scale 1.67: ")
    table = out.split("\n\n")[1].splitlines()
    assert table[0].split() == ["module", "d×k", "rank", "scale", "‖ΔW‖", "eff.", "stable", "90%", "95%", "99%"]
    for row, layer in zip(table[1:], inspect_adapter(made / "one").layers, strict=True):
        m = layer.measure
        assert row.split()[:4] == [m.path, f"{m.shape[0]}×{m.shape[1]}", "3", "1.67"]
        assert float(row.split()[4]) == pytest.approx(m.norm, rel=0.01)
        assert row.split()[7:] == [str(m.rank_for[share]) for share in (0.9, 0.95, 0.99)]


def test_base_and_other_adapter_add_columns(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, made / "one", "--model", made / "base", "--against", made / "other")
    assert (status, err) == (0, "")
    header, row = (line.split() for line in out.split("\n\n")[1].splitlines()[:2])
    assert header[10:] == ["/‖W0‖", "amplif.", "intr.", "cos", "φ", "in", "φ", "out", "disturbed"]
    assert row[-4:] == ["–"] * 4  # down_proj is not in the other
    assert "not compared: 2 only in this adapter" in out and "2 only in the other" in out


def test_json_has_every_number(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (made / "one", "--model", made / "base", "--against", made / "other", "--json")
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    value = json.loads(out, parse_constant=refuse)
    inspection = inspect_adapter(*map(Path, (made / "one", made / "base", made / "other")))
    assert value["not_compared"]["only_theirs"] == list(inspection.unshared.only_theirs)
    for plain, layer in zip(value["layers"], inspection.layers, strict=True):
        assert plain["path"] == layer.measure.path
        assert plain["sigma"] == list(layer.measure.sigma)
        assert plain["rank_for"] == {"90": layer.measure.rank_for[0.9], "95": layer.measure.rank_for[0.95]} | {
            "99": layer.measure.rank_for[0.99]
        }
        assert plain["base"]["amplification"]["factor"] == layer.base.amplification.factor
        assert plain["base"]["intruders"]["similarity"] == layer.base.intruders.similarity
        assert ("against" in plain) == (layer.against is not None)
        if layer.against is not None:
            assert plain["against"]["right"]["grid"] == [list(row) for row in layer.against.right.grid]
            assert plain["against"]["cosine"] == layer.against.cosine


def test_nano_is_a_base(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lowrank.nano import model_path

    if not (model_path() / "config.json").is_file():
        pytest.skip("the shipped model is not built here")
    assert "does not fit" in complaint(capsys, made / "one", "--model", "nano")


def test_files_that_are_no_adapter(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no folder" in complaint(capsys, tmp_path / "nowhere")
    assert "is no adapter" in complaint(capsys, made / "base")
    assert "did you mean one of its subfolders: apart" in complaint(capsys, made)
    broken = shutil.copytree(made / "one", tmp_path / "broken")
    whole = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(whole[:-7])
    assert "too short" in complaint(capsys, broken)
    assert "too short" in complaint(capsys, made / "one", "--against", broken)


def test_values_that_are_not_finite(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(made / "one", tmp_path / "nan")
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if key.endswith("q_proj.lora_B.weight"))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    said = complaint(capsys, folder)
    assert key in said and "not finite" in said


def test_an_adapter_without_low_rank_changes(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(made / "one", tmp_path / "full")
    save_file({"base_model.model.score.weight": torch.ones(2, 2)}, folder / WEIGHTS)
    assert "no LoRA factors" in complaint(capsys, folder)


def test_pickles_need_a_word(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(made / "one", tmp_path / "old")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert "pickle" in complaint(capsys, folder)
    status, out, _ = call(capsys, folder, "--allow-pickle")
    assert status == 0 and out.splitlines()[0] == call(capsys, made / "one")[1].splitlines()[0]


def test_bases_that_are_none_of_this_adapter(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in complaint(capsys, made / "one", "--model", tmp_path / "nowhere")
    assert "adapter" in complaint(capsys, made / "one", "--model", made / "other")
    said = complaint(capsys, made / "one", "--model", made / "bert")
    assert "does not fit" in said and "model.layers.0.self_attn.q_proj" in said
    said = complaint(capsys, made / "smaller", "--model", made / "base")
    assert "do not fit the base's tensor of shape [16, 16]" in said
    broken = shutil.copytree(made / "base", tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-7])
    assert "too short" in complaint(capsys, made / "one", "--model", broken)


def test_a_quantised_base(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(made / "base", tmp_path / "int8")
    tensors = load_file(folder / "model.safetensors")
    save_file({key: tensor.to(torch.int8) for key, tensor in tensors.items()}, folder / "model.safetensors")
    said = complaint(capsys, made / "one", "--model", folder)
    assert "I8" in said and "quantised" in said


def test_adapters_that_share_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, made / "one", "--against", made / "apart")
    assert "nothing to compare" in said and "down_proj" in said and "gate_proj" in said
    said = complaint(capsys, made / "one", "--against", made / "smaller")
    assert "different bases (model.layers.0.self_attn.q_proj is 16×16 in one and 8×8 in the other)" in said


def test_other_bases_are_noted(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(made / "other", tmp_path / "renamed")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/another-model"}))
    ours = shutil.copytree(made / "one", tmp_path / "ours")
    config = json.loads((ours / "adapter_config.json").read_text())
    (ours / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/a-model"}))
    _, out, _ = call(capsys, ours, "--against", folder)
    assert "made for different bases (a-model and another-model)" in out


def test_a_place_for_the_report_is_checked_first(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is a folder" in complaint(capsys, made / "one", "--html", tmp_path)
    assert "inputs are never written to" in complaint(capsys, made / "one", "--html", made / "one" / "report.html")
    assert "--htm" in complaint(capsys, made / "one", "--htm", tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, made / "one", "--html", tmp_path / "report.html")
    assert status == 0 and out.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
