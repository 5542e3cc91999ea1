"""The commands combine, extract, resize and convert: a library call, its report, and wrong calls in a sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from checkpoint_models import answer, disturb, llama
from lowrank import LoraConfig
from lowrank.cli import main


def make(folder, seed=1, **config):
    model = llama()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], **config))
    disturb(model, seed=seed)
    lowrank.save_adapter(model, folder)
    return model


def loaded(folder):
    model = llama()
    lowrank.load_adapter(model, folder)
    return answer(model)


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_combine(tmp_path, capsys):
    make(tmp_path / "a"), make(tmp_path / "b", seed=2)
    call = ["combine", "--adapter", tmp_path / "a", "--adapter", f"{tmp_path / 'b'}:-0.5", "--out", tmp_path / "out"]
    status, out, _ = run(capsys, *call, "--rank", 2, "--json")
    assert status == 0
    report = json.loads(out)
    assert report["method"] == "linear"
    assert len(report["modules"]) == 4
    assert {module["rank"] for module in report["modules"]} == {2}
    assert 0.1 < report["kept"] < 0.999
    status, out, _ = run(capsys, *call[:-1], tmp_path / "again")
    assert status == 0
    assert "4 modules at rank 6" in out
    assert "100.0000% of the energy" in out


def test_extract(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "base")
    model = make(tmp_path / "adapter")
    wanted = answer(model)
    lowrank.merge_and_unload(model).save_pretrained(tmp_path / "tuned")
    call = ["extract", "--model", tmp_path / "base", "--tuned", tmp_path / "tuned", "--out", tmp_path / "out"]
    status, out, _ = run(capsys, *call, "--rank", 3)
    assert status == 0
    assert "4 modules at rank 3" in out
    assert torch.allclose(loaded(tmp_path / "out"), wanted, atol=1e-4)
    status, out, _ = run(capsys, *call[:-1], tmp_path / "again", "--energy", 0.5, "--targets", "q_proj", "--json")
    assert status == 0
    report = json.loads(out)
    assert len(report["modules"]) == 2
    assert {lost["why"] for lost in report["unexpressed"]} == {"it is none of the targets"}


def test_resize(tmp_path, capsys):
    make(tmp_path / "in")
    status, out, _ = run(capsys, "resize", "--adapter", tmp_path / "in", "--rank", 5, "--out", tmp_path / "out")
    assert status == 0
    assert "4 modules at rank 5" in out
    assert torch.allclose(loaded(tmp_path / "out"), loaded(tmp_path / "in"), atol=1e-5)


def test_convert(tmp_path, capsys):
    make(tmp_path / "in")
    llama().save_pretrained(tmp_path / "base")
    call = ["convert", "--source", tmp_path / "in", "--to", "gguf", "--model", tmp_path / "base"]
    status, out, _ = run(capsys, *call, "--out", tmp_path / "x.gguf", "--dtype", "float16")
    assert status == 0
    assert "peft → gguf, 4 modules" in out
    status, out, _ = run(
        capsys,
        "convert",
        "--source",
        tmp_path / "x.gguf",
        "--model",
        tmp_path / "base",
        "--out",
        tmp_path / "o",
        "--json",
    )
    assert status == 0
    assert json.loads(out)["source_format"] == "gguf"
    assert torch.allclose(loaded(tmp_path / "o"), loaded(tmp_path / "in"), atol=0.05)
    assert load_file(tmp_path / "o" / "adapter_model.safetensors")


WRONG = {
    "takes no density": ["combine", "--adapter", "IN", "--out", "OUT", "--density", "0.5"],
    "is no weight, a number": ["combine", "--adapter", "IN:much", "--out", "OUT"],
    'Invalid value "sum"': ["combine", "--adapter", "IN", "--out", "OUT", "--method", "sum"],
    "give a rank, or the share": ["extract", "--model", "IN", "--tuned", "IN", "--out", "OUT"],
    "is an adapter, not a model": ["extract", "--model", "IN", "--tuned", "IN", "--out", "OUT", "--rank", "2"],
    "rank must be a whole number": ["resize", "--adapter", "IN", "--out", "OUT", "--rank", "0"],
    "give true or false": ["convert", "--source", "IN", "--out", "OUT", "--enable-lora", "1,0"],
    "give the model's folder": ["convert", "--source", "IN", "--out", "OUT.gguf", "--to", "gguf"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_end_with_status_2_and_a_sentence(tmp_path, capsys, message):
    make(tmp_path / "in")
    places = {"IN": str(tmp_path / "in"), "OUT": str(tmp_path / "out")}
    arguments = [word.replace("IN", places["IN"], 1).replace("OUT", places["OUT"]) for word in WRONG[message]]
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.startswith("lowrank: error: ")
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["combine", "extract", "resize", "convert"])
def test_help_has_an_example(capsys, name):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert f"lowrank {name} --" in out
