"""Processes that hold a part of the base each (`--shard`) train what one trains, and none ever holds the whole."""

import gc
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing
from torch.distributed.tensor import DTensor
from transformers import core_model_loading as loader

import lowrank
from expert_models import mixture
from lowrank import train
from lowrank.core.shards import is_sharded, whole
from lowrank.errors import LowrankWarning, ProcessLost
from lowrank.kernels import order
from lowrank.study.estimate import estimate as estimating
from lowrank.study.estimate.machines import Rates
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.train import processes, sharding, trainer
from lowrank.train.models import load_causal
from lowrank.train.settings import TrainSettings
from lowrank.train.state.keeper import Keeper
from test_estimate import SecondStep
from test_resume import Killed, made
from test_several_processes import fill, free_port, join
from train_models import completion_rows, llama_config, save_llama, tokenizer, write_jsonl

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")

COMPLETIONS = {"model": "llama", "data": "skill.jsonl", "eval_data": "unseen.jsonl"}
RUNS = {
    "a row a pass": COMPLETIONS | {"micro_batch": 1, "metrics": ("f1",), "sample_prompts": ("the red", "what")},
    "a row a step": COMPLETIONS | {"batch_size": 1, "eval_data": "two.jsonl"},
    "packed and checkpointed": COMPLETIONS | {"pack": True, "max_length": 32, "gradient_checkpointing": True},
    "from the weights": COMPLETIONS | {"init": "pissa", "dora": True},
    "a tied head": COMPLETIONS | {"model": "tied", "targets": "q_proj,lm_head"},
    "a head in full": COMPLETIONS | {"modules_to_save": "lm_head", "bias": "all"},
    "new words": COMPLETIONS | {"trainable_tokens": "very,bad"},
    "preferences": COMPLETIONS | {"data": "better.jsonl", "eval_data": "better.jsonl"},
    "experts": COMPLETIONS | {"model": "experts", "expert_rank": 2},
    "bfloat16": COMPLETIONS | {"dtype": "bfloat16", "dropout": 0.2, "micro_batch": 1},
    "labels": {"model": "bert", "data": "labels.jsonl", "eval_split": 0.3, "targets": None},
}
WIDE = COMPLETIONS | {"model": "wide", "gradient_checkpointing": True, "rank": 1}
WHOLE = ("experts", "bfloat16")  # also with two processes that hold the whole base each
ON = "on from an adapter with a head in full"
BASES = ("llama", "tied", "experts")


def save_wide(folder):
    """A Llama of so many blocks that two of them are little of it."""
    from transformers import LlamaForCausalLM

    config = llama_config(max_position_embeddings=64)
    config.update({"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = fill(tmp_path_factory.mktemp("home"))
    save_llama(home / "tied")
    config = json.loads((home / "tied" / "config.json").read_text())
    (home / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    mixture("mixtral", vocab_size=27, max_position_embeddings=64).save_pretrained(home / "experts")
    tokenizer().save_pretrained(home / "experts")
    save_wide(home / "wide")
    better = [row | {"chosen": row.pop("completion"), "rejected": "a bad film"} for row in completion_rows(9)]
    write_jsonl(home / "better.jsonl", better)
    return home


def settings(home, out, **changes):
    basic = {"targets": "all-linear", "steps": 2, "lr": 0.02, "batch_size": 5, "device": "cpu", "eval_every": 2}
    places = {key: str(home / changes[key]) for key in ("model", "data", "eval_data") if key in changes}
    said = {name: value for name, value in {**basic, **changes, **places}.items() if value is not None}
    return TrainSettings(**said, out=str(out))


class Gathered:
    """Counts the gathers of matrices, and refuses them where there must be none."""

    def __init__(self):
        self.count, self.last = 0, None
        self.forbidden = False
        sharding.Gather.__call__ = self.around(sharding.Gather.__call__)
        DTensor.full_tensor = self.around(DTensor.full_tensor)
        Keeper._write = self.without(Keeper._write)
        Keeper.go_on = self.without(Keeper.go_on)
        trainer._save = self.without(trainer._save)

    def around(self, gather):
        def counted(*args, **options):
            assert not self.forbidden
            self.count += 1
            if self.count == self.last:
                raise Killed
            return gather(*args, **options)

        return counted

    def without(self, what):
        def forbidding(*args):
            self.forbidden = True
            try:
                return what(*args)
            finally:
                self.forbidden = False

        return forbidding


def alive():
    """Bytes of all tensors that there are."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    tensors = [t.to_local() if is_sharded(t) else t for t in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def anonymous():
    """Bytes of this process's own memory, pages of mapped files apart."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


class Heights(SecondStep):
    """What tensors take of the first process after a step, and its own memory at the most while the base is loaded."""

    def __init__(self):
        super().__init__()
        self.tensors, self.own, self.loading, self.standing = alive(), anonymous(), 0, 0
        self.set, loader.set_param_for_module = loader.set_param_for_module, self.counted

    def counted(self, *args):
        self.set(*args)
        self.loading = max(self.loading, anonymous() - self.own)

    def stepped(self, step):
        if step == 1:
            self.standing = alive() - self.tensors
        super().stepped(step)

    def told(self):
        return {"loading": self.loading, "standing": self.standing, "in a step": self.standing + self.height()}


def begin(rank, count, port):
    join(rank, count, port)
    order.FEW_ROWS = 0  # as in this suite's own process
    return Gathered()


def work(rank, count, port, home, out):
    gathered = begin(rank, count, port)
    with processes.joined("cpu"):
        for name, changes in RUNS.items():
            before = gathered.count
            train.run(settings(home, out / name, shard=True, **changes))
            assert gathered.count > before
        for name in WHOLE:
            train.run(settings(home, out / f"{name}, whole", **RUNS[name]))
        on = COMPLETIONS | {"targets": None, "init_from": str(out / "a head in full")}
        train.run(settings(home, out / ON, shard=True, **on))
        train.run(settings(home, out / f"{ON}, whole", **on))
        for name in BASES:
            parts = partial(sharding.Parts, device=torch.device("cpu"), whole=lambda model: ())
            model = load_causal(home / name, torch.float32, parts)
            names = {name for name, parameter in model.named_parameters() if is_sharded(parameter)}
            assert names == {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
            torch.save({name: whole(t) for name, t in model.state_dict().items()}, out / f"{name} {rank}.pt")
        heights = Heights() if Path("/proc/self/smaps_rollup").exists() else SecondStep()
        train.run(settings(home, out / "wide", shard=True, batch_size=count, **WIDE), heights)
        if rank == 0 and isinstance(heights, Heights):
            (out / "heights.json").write_text(json.dumps(heights.told()))
        goes_on(home, out)
        gathered.last = gathered.count + 20 if rank == 0 else None
        with pytest.raises((Killed, ProcessLost)) as end:
            train.run(settings(home, out / "lost", shard=True, **COMPLETIONS))
        (out / f"end {rank}").write_text(str(end.value))
        os._exit(0)  # as `python -m lowrank` does


def goes_on(home, out):
    """A run whose first checkpoint alone is left, as after a kill, is gone on with."""
    drops = COMPLETIONS | {"dropout": 0.2, "steps": 5, "save_every": 2, "keep_checkpoints": 3, "eval_every": 100}
    train.run(settings(home, out / "never stopped", shard=True, **drops))
    if processes.is_first():
        killed = shutil.copytree(out / "never stopped", out / "killed")
        for path in (*killed.glob("*.json"), *killed.glob("*.safetensors"), killed / "README.md"):
            path.unlink()
        for step in (4, 5):
            shutil.rmtree(killed / "checkpoints" / f"step-{step}")
        shutil.copytree(killed, out / "alone")
    processes.wait()
    train.resume(out / "killed")


def several(home, out, count, what):
    multiprocessing.spawn(what, (count, free_port(), home, out), nprocs=count)
    return out


@pytest.fixture(scope="module")
def two(home):
    return several(home, home / "of two", 2, work)


def check_equal(home, found, name):
    out = home / "of one" / name
    if not out.exists():
        train.run(settings(home, out, **RUNS[name]))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (out, found / name))
    assert one.keys() == other.keys()
    for key, wanted in one.items():
        # by norm: AdamW moves an entry whose gradient is all rounding as far as any other
        assert (other[key] - wanted).norm() <= 1e-3 * wanted.norm(), key
    record, of_several = (json.loads((folder / "run.json").read_text()) for folder in (out, found / name))
    assert of_several["trained_tokens"] == record["trained_tokens"] and len(record["evaluations"]) == 2
    for scores, wanted in zip(of_several["evaluations"], record["evaluations"], strict=True):
        assert scores == pytest.approx(wanted, rel=1e-3)
    config = (out / "adapter_config.json").read_bytes()
    assert config == (found / name / "adapter_config.json").read_bytes()


OF_ONE = [name for name in RUNS if name not in WHOLE]  # whose gradients are not of the size of their rounding


@pytest.mark.parametrize("name", OF_ONE)
def test_two_processes_train_what_one_trains(home, two, name):
    check_equal(home, two, name)


@pytest.mark.parametrize("name", [*WHOLE, ON])
def test_parts_of_the_base_give_the_bytes_of_the_whole(two, name):
    whole, parts = made(two / f"{name}, whole"), made(two / name)
    assert parts == whole


@pytest.mark.parametrize("name", ["a row a pass", "from the weights", "a head in full"])
def test_peft_answers_with_the_adapter_of_a_run_in_parts_as_it_was_trained(home, two, name):
    peft = pytest.importorskip("peft")
    ids = torch.arange(24).view(2, 12) % 27
    ours = load_causal(home / "llama", torch.float32).eval()
    lowrank.load_adapter(ours, two / name)
    theirs = peft.PeftModel.from_pretrained(load_causal(home / "llama", torch.float32), str(two / name)).eval()
    with torch.no_grad():
        wanted, found = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
        base = load_causal(home / "llama", torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - base).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_ONE)
def test_four_processes_train_what_one_trains(home, name):
    out = home / "of four"
    check_equal(home, out if out.exists() else several(home, out, 4, work), name)


@pytest.mark.parametrize("name", BASES)
def test_what_is_loaded_in_parts_is_what_is_loaded_whole(home, two, name):
    wanted = load_causal(home / name, torch.float32).state_dict()
    for rank in range(2):
        found = torch.load(two / f"{name} {rank}.pt")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says what memory is a process's own")
def test_no_process_holds_the_whole_base(home, two):
    base = sum(p.nbytes for p in load_causal(home / "wide", torch.float32).parameters())
    heights = json.loads((two / "heights.json").read_text())
    assert heights["standing"] < 0.55 * base and heights["loading"] < 0.8 * base and heights["in a step"] < 0.8 * base


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says what memory is a process's own")
def test_what_a_process_takes_is_estimated_before(home, two, monkeypatch):
    monkeypatch.setattr(estimating, "pace_of", lambda *_: Rates(1e12, 1e11, 0.0))
    heights = json.loads((two / "heights.json").read_text())
    asked = {"rank": 1, "targets": "all-linear", "gradient_checkpointing": True, "batch_size": 2, "max_length": 16}
    asked |= {"model": str(home / "wide"), "device": "cpu", "processes": 2, "shard": True}
    found = estimating.estimate(EstimateSettings(**asked))
    standing = found.weights + found.factors + found.optimiser
    assert standing == pytest.approx(heights["standing"], rel=0.15)
    assert found.height == pytest.approx(heights["in a step"], rel=0.15)


def test_killed_and_gone_on_with_parts_gives_the_bytes_of_a_run_that_was_not(two):
    assert made(two / "killed") == made(two / "never stopped")


def test_it_goes_on_with_one_process_that_holds_the_whole(two):
    with pytest.warns(LowrankWarning, match=r"processes 1 \(was 2, each with a part of the base\).*not bit for bit"):
        train.resume(two / "alone", shard=False)
    assert made(two / "alone")["run"]["trained_tokens"] == made(two / "killed")["run"]["trained_tokens"]


def test_a_process_that_is_lost_in_a_gather_is_said(two):
    assert "process 1 of 2, counted from 0, lost another one" in (two / "end 1").read_text()
