"""`--attention`: what transformers is asked for, what cannot run here, and that a run keeps to it."""

from pathlib import Path

import pytest
import torch
import yaml

from lowrank import cli, train
from lowrank.errors import ConfigError
from lowrank.study.estimate.estimate import estimate
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.train.attention import attention_options
from lowrank.train.settings import HeldSettings, MachineSettings
from lowrank.train.task import load
from resumed_runs import kill, make_home, settings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("model", "kind", "quantise"),
    [("llama", "completion", None), ("llama", "completion", "nf4"), ("bert", "labels", None)],
)
def test_every_way_of_loading_asks_for_it(home, name, model, kind, quantise):
    if quantise:
        pytest.importorskip("bitsandbytes")
    kind = "classification" if kind == "labels" else kind
    found = load(home / model, kind, ("a", "b"), HeldSettings(attention=name, quantise=quantise, device="cpu"))
    assert found.model.config._attn_implementation == name


def test_left_alone_the_choice_is_that_of_transformers(home):
    assert attention_options(MachineSettings(), CPU, torch.float32) == {}
    found = load(home / "llama", "completion", (), MachineSettings(device="cpu"))
    assert found.model.config._attn_implementation == "sdpa"


def test_a_run_keeps_to_it(home, tmp_path):
    kill(settings(home, tmp_path / "run", attention="eager"), 3)
    assert yaml.safe_load((tmp_path / "run" / "train.yaml").read_text())["attention"] == "eager"
    with pytest.raises(ConfigError, match=r"--attention sdpa \(the run has eager\) cannot change"):
        train.resume(tmp_path / "run", attention="sdpa")


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_kernels_that_cannot_run_here_are_said_before_anything_is_read(name, tmp_path, capsys):
    line = ["train", "--model", "nano", "--data", "none.jsonl", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*line, "--attention", name]) == 2
    assert f"--attention {name}: its kernels run on GPUs, not on cpu; leave it out" in capsys.readouterr().err


def test_flash_attention_needs_its_package_and_16_bits(monkeypatch):
    asked = MachineSettings(attention="flash_attention_2")
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert attention_options(asked, GPU, torch.bfloat16) == {"attn_implementation": "flash_attention_2"}
    with pytest.raises(ConfigError, match="its kernels compute in 16 bits; give --dtype bfloat16"):
        attention_options(asked, GPU, torch.float32)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ConfigError, match="--attention flash_attention_2 needs the package flash_attn, which is not"):
        attention_options(asked, GPU, torch.bfloat16)


def test_an_estimate_holds_all_scores_of_eager_attention(home):
    """rows × heads × length² of them, and flash attention's none, whether its package is here or not."""
    asked = {"model": str(home / "llama"), "max_length": 64, "batch_size": 2}
    found = {
        name: estimate(EstimateSettings(**asked, gpu="L4", attention=name)).activations
        for name in (None, "eager", "sdpa", "flash_attention_2")
    }
    assert found["sdpa"] == found["flash_attention_2"] == found[None]
    scores = 2 * 2 * 4 * 64**2 * 2  # of two layers in bfloat16
    assert found["eager"] - found["sdpa"] >= scores
