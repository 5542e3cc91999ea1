"""Whether processes hold parts of the base: as asked, as a GPU has room, and what is said where it cannot be."""

import json
import shutil

import pytest
import torch
from torch import nn

from lowrank import train
from lowrank.cli import main
from lowrank.errors import ConfigError
from lowrank.train import dealt_out, sharding
from lowrank.train.dealt_out import is_dealt_out, said, whole_of
from lowrank.train.models import load_causal, load_judge
from lowrank.train.settings import TrainSettings
from train_models import completion_rows, save_bert, save_llama, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "llama")
    write_jsonl(home / "rows.jsonl", completion_rows(8))
    return home


def settings(home, **changes):
    places = {"model": str(home / "llama"), "data": str(home / "rows.jsonl"), "out": str(home / "out")}
    return TrainSettings(**{**places, **changes})


@pytest.fixture
def _two(monkeypatch):
    monkeypatch.setattr(dealt_out.processes, "grouped", lambda: True)
    monkeypatch.setattr(dealt_out.processes, "count", lambda: 2)


def test_alone_it_says_how_several_are_started(home, capsys):
    with pytest.raises(ConfigError, match=r"this one is alone: start them with torchrun --nproc-per-node N"):
        train.run(settings(home, shard=True))
    flags = ["train", "--model", str(home / "llama"), "--data", str(home / "rows.jsonl"), "--out", str(home / "out")]
    assert main([*flags, "--shard"]) == 2
    assert "--no-shard" in capsys.readouterr().err
    assert not (home / "out").exists()


@pytest.mark.parametrize("other", [{"full": True}, {"quantise": "nf4"}])
def test_what_it_does_not_go_with(home, other):
    with pytest.raises(ValueError, match="shard deals out"):
        settings(home, shard=True, **other)


@pytest.mark.usefixtures("_two")
def test_a_base_that_comes_quantised_is_refused(home, tmp_path):
    shutil.copytree(home / "llama", tmp_path / "held")
    config = json.loads((tmp_path / "held" / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "held" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ConfigError, match="is quantised, and such weights are not dealt out"):
        is_dealt_out(settings(home, shard=True), tmp_path / "held")
    assert is_dealt_out(settings(home, shard=True), home / "llama")
    assert is_dealt_out(settings(home, shard=False), tmp_path / "held") is False


def test_a_model_without_blocks_is_refused():
    with torch.device("meta"), pytest.raises(ConfigError, match="no blocks are found in a Sequential"):
        sharding.put_in_parts(nn.Sequential(nn.Linear(3, 4)), torch.device("cpu"), ())


def test_a_base_that_a_gpu_cannot_hold_is_dealt_out(home, monkeypatch):
    """Two processes deal it out by themselves; one says that there is --shard; nobody is asked on a CPU."""
    base, asked = home / "llama", settings(home, device="cpu")
    size = sum(parameter.nbytes for parameter in load_causal(base, torch.float32).parameters())
    assert is_dealt_out(asked, base) is False
    for room, dealt in ((0.5, True), (1.05, True), (1.2, False)):  # of what its weights take
        with monkeypatch.context() as gpu:
            gpu.setattr(dealt_out, "memory_of", lambda device, has=room * size: has)
            if room < 1:
                with pytest.raises(ConfigError, match=r"weights take .* GB, and cpu has .*lowrank train ... --shard"):
                    is_dealt_out(asked, base)
            else:
                assert is_dealt_out(asked, base) is False
            gpu.setattr(dealt_out.processes, "grouped", lambda: True)
            assert is_dealt_out(asked, base) is dealt
            assert is_dealt_out(settings(home, device="cpu", shard=False), base) is False
            assert is_dealt_out(settings(home, device="cpu", quantise="nf4"), base) is False


@pytest.mark.usefixtures("_two")
def test_the_panel_says_what_each_holds(home):
    whole = load_causal(home / "llama", torch.float32)
    assert said(settings(home), whole) == "2, which share the rows of a step; each holds the whole base"


def test_what_is_trained_in_full_stays_whole(home, tmp_path):
    model = load_causal(home / "llama", torch.float32)
    asked = settings(home, modules_to_save="mlp.up_proj,norm", trainable_tokens="good")
    names = whole_of(asked, "completion")(model)
    assert names == ["mlp.up_proj", "norm", "model.embed_tokens", "lm_head"]
    blocks = [path for path, _ in sharding.blocks_of(model)]
    assert blocks == ["model.layers.0", "model.layers.1"]
    kept = sharding.kept_whole(model, set(blocks), ["mlp.up_proj"])
    left = [name for name, p in model.named_parameters() if p.dim() > 1 and any(p is one for one in kept)]
    assert left == ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    judge, _ = load_judge(save_bert(tmp_path / "bert"), ("bad", "good"), torch.float32)
    assert whole_of(settings(home), "classification")(judge) == ["classifier", "pooler"]


def test_a_weight_of_several_blocks_stays_whole(home):
    """FSDP2 takes a weight into one group only."""
    model = load_causal(home / "llama", torch.float32)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    kept = sharding.kept_whole(model, {"model.layers.0", "model.layers.1"}, ())
    assert [p for p in kept if p.dim() > 1] == [first.mlp.up_proj.weight]
