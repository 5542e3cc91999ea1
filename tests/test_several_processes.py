"""Several processes train what one trains: losses, figures and final factors within rounding; and one writes."""

import json
import os
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from lowrank import launch, train
from lowrank.cli.several import tells_the_end
from lowrank.errors import LowrankWarning, ProcessLost
from lowrank.train import processes
from lowrank.train.preparing import prepare
from lowrank.train.settings import TrainSettings
from lowrank.train.state.randomness import seeded
from lowrank.train.state.store import steps_kept
from test_resume import Killed, KilledAfter, made
from train_models import completion_rows, label_rows, save_bert, save_llama, write_jsonl

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")

RUNS = {
    "completions": {
        "model": "llama",
        "data": "skill.jsonl",
        "eval_data": "unseen.jsonl",
        "metrics": ("f1",),
        "sample_prompts": "the red",
    },
    "a row a step": {"model": "llama", "data": "skill.jsonl", "batch_size": 1, "eval_data": "two.jsonl"},
    "packed": {"model": "llama", "data": "skill.jsonl", "pack": True, "max_length": 32, "eval_data": "unseen.jsonl"},
    "labels": {"model": "bert", "data": "labels.jsonl", "eval_split": 0.3, "targets": None},
}


def fill(home):
    """A folder with models whose own dropout is off, since each process draws its own, and rows for them."""
    save_llama(home / "llama")
    save_bert(home / "bert")
    config = json.loads((home / "bert" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (home / "bert" / "config.json").write_text(json.dumps(config))
    write_jsonl(home / "skill.jsonl", completion_rows(30))
    write_jsonl(home / "unseen.jsonl", completion_rows(7, seed=5))
    write_jsonl(home / "two.jsonl", completion_rows(2, seed=5))
    write_jsonl(home / "labels.jsonl", label_rows(40))
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("home"))


def settings(home, out, name, **changes):
    basic = {"template": "{prompt} ->"} if RUNS[name]["model"] == "llama" else {}
    basic |= {"targets": "all-linear", "steps": 4, "lr": 0.02, "batch_size": 5, "device": "cpu", "eval_every": 2}
    chosen = {**basic, **RUNS[name]}
    places = {key: str(home / chosen[key]) for key in ("model", "data", "eval_data") if key in chosen}
    return TrainSettings(**{**chosen, **places, **changes}, out=str(out))


def join(rank, count, port):
    """What torchrun would say to this process."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)


def work(rank, count, port, home, out):
    join(rank, count, port)
    with processes.joined("cpu"):
        for name in RUNS:
            train.run(settings(home, out / name, name))
    os._exit(0)  # as `python -m lowrank` does


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def several(home, out, count, what=work):
    multiprocessing.spawn(what, (count, free_port(), home, out), nprocs=count)
    return out


@pytest.fixture(scope="module")
def two(home):
    return several(home, home / "of two", 2)


def check_equal(home, found, name):
    out = home / "of one" / name
    if not out.exists():
        train.run(settings(home, out, name))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (out, found / name))
    assert one.keys() == other.keys()
    for key, wanted in one.items():
        assert (other[key] - wanted).abs().max() <= 2e-4 * wanted.abs().max(), key
    record, of_several = (json.loads((folder / "run.json").read_text()) for folder in (out, found / name))
    assert of_several["trained_tokens"] == record["trained_tokens"] and of_several["tokens"] == record["tokens"]
    assert len(of_several["evaluations"]) == 3
    for scores, wanted in zip(of_several["evaluations"], record["evaluations"], strict=True):
        assert scores == pytest.approx(wanted, rel=1e-3)
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (out, found / name)]
    assert len(logs[0]) == len(logs[1])


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_trains(home, two, name):
    check_equal(home, two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_four_processes_train_what_one_trains(home, name):
    out = home / "of four"
    check_equal(home, out if out.exists() else several(home, out, 4), name)


def stopped_and_gone_on_with(rank, count, port, home, out):
    join(rank, count, port)
    drops = {"dropout": 0.2, "steps": 7, "save_every": 2, "eval_every": 100, "metrics": ()}
    with processes.joined("cpu"):
        if (out / "killed").exists():
            train.resume(out / "killed")
        else:
            train.run(settings(home, out / "whole", "completions", **drops))
            with pytest.raises((Killed, ProcessLost)):
                train.run(settings(home, out / "killed", "completions", **drops), KilledAfter(5))
    os._exit(0)


def test_killed_and_gone_on_with_two_processes_give_the_bytes_of_a_run_that_was_not(home, tmp_path):
    several(home, tmp_path, 2, stopped_and_gone_on_with)
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    assert steps_kept(tmp_path / "killed")[-1] == 4
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "killed", alone)
    several(home, tmp_path, 2, stopped_and_gone_on_with)
    whole, killed = (made(tmp_path / name) for name in ("whole", "killed"))
    assert killed == whole
    with pytest.warns(LowrankWarning, match=r"processes 1 \(was 2\).*not bit for bit"):
        train.resume(alone)
    assert made(alone)["run"]["trained_tokens"] == whole["run"]["trained_tokens"]


def exchange(rank, port, out):
    join(rank, 2, port)
    with processes.joined("cpu"):
        assert processes.summed(rank + 1) == 3 and processes.summed_float(0.25) == 0.5
        assert processes.share(range(5)) == range(rank, 5, 2)
        assert processes.gathered({"of": rank, "ü": "x" * 50 * rank}) == [{"of": 0, "ü": ""}, {"of": 1, "ü": "x" * 50}]
        tensors = {} if rank == 0 else {"a": torch.arange(3), "b": torch.tensor([[0.1]])}
        first, second = processes.gathered_tensors(tensors)
        assert not first and second["a"].tolist() == [0, 1, 2] and second["b"].item() == torch.tensor(0.1).item()
        parameters = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
        parameters += [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(()))]
        parameters[0].grad = torch.tensor([1.0, 2.0])
        parameters[1].grad = torch.tensor([1.0, rank], dtype=torch.bfloat16)
        parameters[2 + rank].grad = torch.full_like(parameters[2 + rank], 5.0)
        processes.add_up(parameters)
        assert [p.grad.tolist() for p in parameters] == [[2.0, 4.0], [2.0, 1.0], [5.0, 5.0, 5.0], 5.0]
        untouched = torch.nn.Parameter(torch.zeros(2))
        processes.add_up([untouched])
        assert untouched.grad is None
        own = torch.full((2,), float(rank))
        processes.same_everywhere([own])
        assert own.tolist() == [0.0, 0.0]
        told = processes.gathered(tells_the_end())
        assert sorted(told) == [False, True]
        with processes.first_ahead():
            place = out / "left by the first"
            assert place.exists() == (rank == 1)
            place.touch()
    os._exit(0)


def test_what_processes_tell_each_other(tmp_path):
    multiprocessing.spawn(exchange, (free_port(), tmp_path), nprocs=2)


def dropped(rank, count, port, home, out):
    join(rank, count, port)
    with processes.joined("cpu"), seeded(3):
        prepare(settings(home, out, "completions"))
        (out / str(rank)).write_text(str(torch.rand(3).tolist()))
    os._exit(0)


def test_every_process_drops_something_else(home, tmp_path):
    several(home, tmp_path, 2, dropped)
    assert (tmp_path / "0").read_text() != (tmp_path / "1").read_text()


def test_alone_nothing_is_asked_of_others():
    assert processes.count() == 1 and processes.is_first() and processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.gathered([1]) == [[1]] and processes.summed(7) == 7 and tells_the_end()
    assert launch.lacking() is None
