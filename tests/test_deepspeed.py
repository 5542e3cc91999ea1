"""DeepSpeed's first two stages under Trainer: two processes on CPUs give the losses and the adapter of one.

DeepSpeed is no dependency: where it is installed, `DS_ACCELERATOR=cpu` has it train on CPUs, with gloo. It compiles an
operation of its own when it is used first, a minute with g++.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

sys.path.insert(0, str(Path(__file__).parent))  # for the processes that are started

from checkpoint_models import contents
from lowrank.errors import LowrankError
from lowrank.integrations import as_peft
from test_accelerate_processes import shard_on_cpus
from test_pretrained import ADAPTER, injected, train
from test_several_processes import free_port, join

pytestmark = pytest.mark.slow


def config(stage):
    """As a user has it who leaves the sizes to Trainer, and the optimiser."""
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto")
    return auto | {"zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False}


def work(rank, port, folder, stage, how):
    """Train and save."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", LOCAL_SIZE="2")
    join(rank, 2, port)
    shard_on_cpus()  # accelerate has DeepSpeed on GPUs alone
    model, options = injected(), {"per_device_train_batch_size": 1, "use_cpu": False, "deepspeed": config(stage)}
    if stage == 3:
        with pytest.raises(LowrankError, match=r"ZeRO stage 3 .* use stage 1 or 2, or FSDP2"):
            train(as_peft(model), folder / "run", **options)
        os._exit(0)
    trainer, losses = train(as_peft(model) if how == "as_peft" else model, folder / "run", **options)
    trainer.save_model(str(folder / "end"))
    if rank == 0:
        engine = type(trainer.model_wrapped).__name__
        torch.save((engine, losses, {name: t.clone() for name, t in model.state_dict().items()}), folder / "seen.pt")
    torch.distributed.barrier()
    os._exit(0)  # torch's own threads may abort a process that ends slowly


@pytest.mark.parametrize("how", ["as_peft", "the model itself"])
@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_train_and_save_as_one(stage, how, tmp_path):
    pytest.importorskip("deepspeed")
    alone = injected()
    _, wanted = train(alone, tmp_path / "alone")
    multiprocessing.spawn(work, (free_port(), tmp_path, stage, how), 2)
    engine, losses, state = torch.load(tmp_path / "seen.pt")
    assert engine == "DeepSpeedEngine" and losses == pytest.approx(wanted, rel=1e-5)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert set(contents(tmp_path / "end")) == ADAPTER | {"training_args.bin"}


def test_the_third_stage_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    multiprocessing.spawn(work, (free_port(), tmp_path, 3, "as_peft"), 2)
