"""What `--optimizer` names: whose steps they are, what they remember, and what runs of older versions get."""

import json
import sys
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank import cli, train
from lowrank.errors import CheckpointError, ConfigError
from lowrank.study.estimate.estimate import estimate
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.train.adamw import UPDATES, bytes_of, fresh, written
from lowrank.train.optimiser import Optimiser
from lowrank.train.settings import LoopSettings
from lowrank.train.state.store import steps_kept
from resumed_runs import kill, made, make_home, settings
from train_models import WORDS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model so wide that the moments of its factors are held in 8 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    home = make_home(tmp_path_factory.mktemp("wide"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": len(WORDS)}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(home / "llama")
    return home


def stepped(parameters: list[nn.Parameter], steps: int = 5, **asked: Any) -> Optimiser:
    """An optimiser that has taken steps along gradients that are always the same."""
    optimiser = Optimiser(parameters, LoopSettings(lr=0.01, weight_decay=0.1, **asked), parameters[1:])
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            draw = torch.Generator().manual_seed(7 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimiser.step(1.0)
    return optimiser


def numbers(count: int, offset: int = 0) -> nn.Parameter:
    """`count` numbers, laid down so far behind the start of their memory."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return nn.Parameter(torch.cat([torch.zeros(offset), values])[offset:])


@pytest.mark.parametrize("name", ["adamw", "adamw-unfused"])
def test_the_bits_of_a_step_depend_on_no_heap_and_no_thread(name):
    threads = torch.get_num_threads()
    found = []
    try:
        for offset, count in ((0, 1), (1, 1), (3, 2)):
            torch.set_num_threads(count)
            parameters = [numbers(70_003, offset), numbers(5, offset)]
            stepped(parameters, optimizer=name)
            found.append(torch.cat([p.detach() for p in parameters]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


def test_eight_bits_are_near_and_take_a_quarter(home):
    pytest.importorskip("bitsandbytes")
    moved = {}
    for name in ("adamw", "adamw8bit"):
        parameters = [numbers(8192), numbers(100)]
        before = [p.detach().clone() for p in parameters]
        optimiser = stepped(parameters, optimizer=name, lr_ratio=4.0)
        moved[name] = [p.detach() - old for p, old in zip(parameters, before, strict=True)]
        held = [
            t for p in parameters for t in written(optimiser.adamw.state[p]).values() if torch.is_tensor(t) and t.dim()
        ]
        assert bytes_of(name, parameters) == sum(t.nbytes for t in held)
    assert bytes_of("adamw8bit", [parameters[0]]) < 0.26 * bytes_of("adamw", [parameters[0]])
    torch.testing.assert_close(moved["adamw8bit"][1], moved["adamw"][1], rtol=1e-4, atol=1e-6)  # held in float32
    apart = (moved["adamw8bit"][0] - moved["adamw"][0]).norm() / moved["adamw"][0].norm()
    assert 1e-5 < apart < 0.1


@pytest.mark.parametrize("name", UPDATES)
def test_what_is_remembered_is_known_before_the_first_step(name):
    """A checkpoint is held to it: keys, shapes, dtypes."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    parameters = [numbers(5000), numbers(7)]
    optimiser = stepped(parameters, optimizer=name)
    for parameter in parameters:
        before, after = fresh(optimiser.adamw, parameter), optimiser.adamw.state[parameter]
        assert before.keys() == after.keys()
        for key, value in after.items():
            assert type(before[key]) is type(value)
            if torch.is_tensor(value):
                assert (before[key].shape, before[key].dtype) == (value.shape, value.dtype)


def test_a_run_of_an_older_version_goes_on_with_its_own_steps(home, tmp_path):
    """Its settings and its checkpoint name no optimiser: it has the bits of what the default was then."""
    train.run(settings(home, tmp_path / "whole", optimizer="adamw-unfused"))
    out = tmp_path / "old"
    kill(settings(home, out, optimizer="adamw-unfused"), 5)
    lines = (out / "train.yaml").read_text().splitlines(keepends=True)
    (out / "train.yaml").write_text("".join(line for line in lines if not line.startswith("optimizer")))
    for step in steps_kept(out):
        path = out / "checkpoints" / f"step-{step}" / "state.json"
        facts = json.loads(path.read_text())
        del facts["about"]["settings"]["optimizer"]
        path.write_text(json.dumps(facts))
    train.resume(out)
    assert made(out) == made(tmp_path / "whole")
    assert yaml.safe_load((out / "train.yaml").read_text())["optimizer"] == "adamw-unfused"


def test_the_optimiser_of_a_run_cannot_change(home, tmp_path):
    kill(settings(home, tmp_path / "run"), 3)
    with pytest.raises(ConfigError, match=r"--optimizer adamw-unfused \(the run has adamw\) cannot change"):
        train.resume(tmp_path / "run", optimizer="adamw-unfused")


def test_eight_bits_go_on_exactly(wide, tmp_path):
    """Killed in the third epoch: the moments come back in the form that they have, with LoRA+ and weight decay."""
    pytest.importorskip("bitsandbytes")
    asked = {"model": str(wide / "llama"), "optimizer": "adamw8bit", "rank": 16, "lr_ratio": 3.0, "weight_decay": 0.1}
    train.run(settings(wide, tmp_path / "whole", **asked))
    out = tmp_path / "killed"
    kill(settings(wide, out, **asked), 5)
    path = out / "checkpoints" / "step-4" / "state.safetensors"
    tensors = load_file(path)
    first = [name for name, t in tensors.items() if name.startswith("optimiser.state1.") and t.dtype == torch.uint8]
    assert len(first) >= 4
    train.resume(out)
    assert made(out) == made(tmp_path / "whole")

    kill(settings(wide, tmp_path / "other", **asked), 5)
    path = tmp_path / "other" / "checkpoints" / "step-4" / "state.safetensors"
    save_file({name: t.float() if name in first else t for name, t in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=r"state1\..* of torch\.float32 in the .* would be .* of torch\.uint8"):
        train.resume(tmp_path / "other")


def test_eight_bits_need_bitsandbytes(home, tmp_path, monkeypatch, capsys):
    """Said before anything is read."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = ["train", "--model", "nano", "--data", "none.jsonl", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*line, "--optimizer", "adamw8bit"]) == 2
    assert "--optimizer adamw8bit needs bitsandbytes: pip install 'lowrank[quant]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_bitsandbytes_without_a_step_for_the_device_is_said(home, tmp_path, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")

    def step(self: Any) -> None:
        raise NotImplementedError("no kernel\nfor cpu")

    monkeypatch.setattr(bnb.optim.AdamW8bit, "step", step)
    with pytest.raises(ConfigError, match=r"has no such step on cpu \(no kernel for cpu\): upgrade it"):
        train.run(settings(home, tmp_path / "run", optimizer="adamw8bit"))


def test_an_estimate_knows_of_it(wide):
    asked = {"model": str(wide / "llama"), "targets": "all-linear", "rank": 16, "max_length": 16, "gpu": "L4"}
    one, other = (estimate(EstimateSettings(**asked, optimizer=name)) for name in ("adamw", "adamw8bit"))
    assert one.optimiser == 8 * one.trained
    assert other.optimiser == (2 + 8 / 256) * one.trained
    assert one.height - other.height == one.optimiser - other.optimiser
