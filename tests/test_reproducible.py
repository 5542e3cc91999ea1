"""A run is a function of its seed: the same bytes each time, whatever was learned before and wherever memory lies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank import train
from lowrank.kernels import order
from lowrank.train.settings import TrainSettings
from seeded_training import digests, forget
from train_models import completion_rows, save_llama, write_jsonl

PROGRAM = Path(__file__).with_name("seeded_training.py")
FEW_ROWS = True  # as users have it: the batches here have more

DTYPES = ["float64", "float32", "bfloat16"]
KINDS = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "checkpointed": {"checkpointing": "non-reentrant"},
    "checkpointed, reentrant, dropout": {"checkpointing": "reentrant", "dropout": 0.3},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_that_was_learned_is_in_the_bytes(dtype, kind):
    """One after the other in one process, with a restart between, and with nothing ever computed together."""
    forget()
    first = digests(dtype, **kind)
    assert len(set(first)) == len(first)
    assert digests(dtype, **kind) == first
    assert digests(dtype, **kind, restart=5) == first
    assert digests(dtype, **kind, together_=False) == first


def in_fresh_process(hash_seed, **settings):
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    run = subprocess.run(
        [sys.executable, PROGRAM, json.dumps(settings)], capture_output=True, text=True, check=True, env=env
    )
    return json.loads(run.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_process_with_another_heap_gives_the_same_bytes(dtype):
    here = digests(dtype, dropout=0.3)
    threads = torch.get_num_threads()  # other numbers of threads sum in other orders
    assert in_fresh_process(7, dtype=dtype, dropout=0.3, junk=3001, threads=threads) == here


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("few", [0, 128])
def test_a_training_from_files_gives_the_same_file(tmp_path, monkeypatch, few, dropout):
    """The whole way, from a folder and rows to a saved adapter, by the kernels and by plain operations.

    Between the two another adapter is trained, by other layers at the same ids or not, and memory lies elsewhere.
    """
    monkeypatch.setattr(order, "FEW_ROWS", few)
    model, data = save_llama(tmp_path / "llama"), write_jsonl(tmp_path / "rows.jsonl", completion_rows(24))
    targets = {"rank": 3, "targets": "all-linear"}

    def trained(out, **changes):
        basic = {"model": str(model), "data": str(data), "out": str(tmp_path / out), "device": "cpu", "steps": 4}
        train.run(TrainSettings.model_validate({**basic, **targets, "dropout": dropout, **changes}))
        return (tmp_path / out / "adapter_model.safetensors").read_bytes()

    first = trained("first")
    assert trained("other", seed=1) != first
    heap = [torch.empty(37 * i % 4099 + 1) for i in range(3001)][::2]
    trained("narrower", targets="q_proj,v_proj", rank=5)
    assert trained("second") == first
    del heap


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_thirty_steps_in_three_processes(dtype, kind):
    here = digests(dtype, steps=30, **kind)
    assert digests(dtype, steps=30, restart=11, **kind) == here
    for seed, junk in ((1, 0), (2, 5003)):
        assert in_fresh_process(seed, dtype=dtype, steps=30, junk=junk, **kind) == here


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_thirty_steps_on_two_threads(dtype):
    runs = [in_fresh_process(n, dtype=dtype, steps=30, threads=2, junk=n * 4001, restart=9 * n) for n in range(3)]
    assert runs[0] == runs[1] == runs[2]
