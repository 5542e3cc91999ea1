"""Two gloo processes under accelerate and Trainer: DDP and FSDP2 give the losses and the adapter of one process."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

sys.path.insert(0, str(Path(__file__).parent))  # for the processes that are started

from checkpoint_models import contents, llama
from lowrank.errors import LowrankError
from lowrank.integrations import as_peft
from test_pretrained import ADAPTER, injected, train

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def work(rank, port, folder, how):
    """Train, save, and go on from the checkpoint after the fourth step."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    if how != "ddp":
        os.environ.update(SHARDED)
        os.environ.update(FSDP_CPU_RAM_EFFICIENT_LOADING=str(how == "fsdp2, from one").lower())
        shard_on_cpus()
    model, options = injected(), {"per_device_train_batch_size": 1, "ddp_backend": "gloo"}
    if how == "fsdp2":
        os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
        with pytest.raises(LowrankError, match="set fsdp_state_dict_type to FULL_STATE_DICT"):
            train(as_peft(injected()), folder / "refused", **options)
        os.environ.update(SHARDED)
    trainer, losses = train(model if how == "ddp" else as_peft(model), folder / "run", **options)
    trainer.save_model(str(folder / "end"))
    whole = {name: tensor.clone() for name, tensor in gathered(model).items()}
    again = injected()
    _, rest = train(again if how == "ddp" else as_peft(again), folder / "again", folder / "run/checkpoint-4", **options)
    apart = [name for name, tensor in gathered(again).items() if not torch.equal(tensor, whole[name])]
    sharded = [name for name, p in trainer.model.named_parameters() if hasattr(p, "full_tensor")]
    if rank == 0:
        torch.save((losses, rest, apart, len(sharded), whole), folder / "seen.pt")
    distributed.barrier()
    os._exit(0)  # torch's own threads may abort a process that ends slowly


def shard_on_cpus():
    """accelerate shards between GPUs alone: it is told that the CPUs are some."""
    from accelerate import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def gathered(model):
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "fsdp2, from one"])
def test_two_processes_train_save_and_resume_as_one(how, tmp_path):
    alone = injected()
    _, wanted = train(alone, tmp_path / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, tmp_path, how), 2)
    losses, rest, apart, sharded, whole = torch.load(tmp_path / "seen.pt")
    assert losses == pytest.approx(wanted, rel=1e-5) and rest[-2:] == losses[-2:] and not apart
    assert sharded == (0 if how == "ddp" else len(list(alone.named_parameters())))
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    end, checkpoint = contents(tmp_path / "end"), tmp_path / "run/checkpoint-4"
    assert set(end) == ADAPTER | {"training_args.bin"}
    base = sum(p.numel() * p.element_size() for p in llama().parameters())
    kept = {path.name: path.stat().st_size for path in checkpoint.iterdir() if "model" in path.name}
    assert kept and max(kept.values()) < base / 3, "a checkpoint holds the base"
