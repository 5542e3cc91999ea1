"""Adapters of models that FSDP2 shards over two processes, or DDP wraps: saved and loaded as on one."""

import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

sys.path.insert(0, str(Path(__file__).parent))  # for the processes that are started

import lowrank
from checkpoint_models import answer, contents, disturb, llama
from lowrank import LoraConfig
from lowrank.errors import CheckpointError, LowrankError

CASES = {
    "plain": {},
    "scales": {"alpha_pattern": {"0.self_attn.q_proj": 2}},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "saved": {"modules_to_save": ["norm"]},
}


def adapted(options):
    model = llama()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], **options))
    return disturb(model)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank, port, folder):
    """What each process does: save as every process calls it, as Trainer does, and load onto a sharded base."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, options in CASES.items():
        model = sharded(adapted(options))
        lowrank.save_adapter(model, folder / f"{name} saved")
        model.save_pretrained(folder / f"{name} pretrained", is_main_process=rank == 0)
        state = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in model.state_dict().items()}
        if rank == 0:  # Trainer gathers, and then calls it in the first process alone
            model.save_pretrained(folder / f"{name} gathered", state_dict=state)
        distributed.barrier()
        base = sharded(llama())
        if name == "saved":
            with pytest.raises(CheckpointError, match="which is sharded: load it before fully_shard"):
                lowrank.load_adapter(base, folder / f"{name} saved")
            continue
        lowrank.load_adapter(base, folder / f"{name} saved")
        torch.save(answer(base), folder / f"{name} {rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_save_what_one_saves_and_load_what_it_loads(tmp_path):
    """One test, since the start of two processes takes most of its time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, tmp_path), 2)
    for case, options in CASES.items():
        model = adapted(options)
        lowrank.save_adapter(model, tmp_path / case)
        for how in ("saved", "pretrained", "gathered"):
            assert contents(tmp_path / f"{case} {how}") == contents(tmp_path / case), (case, how)
        for loaded in tmp_path.glob(f"{case} ?.pt"):
            torch.testing.assert_close(torch.load(loaded), answer(model), rtol=1e-5, atol=1e-5)
    assert len(list(tmp_path.glob("*.pt"))) == 2 * (len(CASES) - 1)


@pytest.mark.usefixtures("_one_process")
def test_ddps_wrapper_is_seen_through(tmp_path):
    model = adapted({})
    lowrank.save_adapter(model, tmp_path / "a")
    lowrank.save_adapter(nn.parallel.DistributedDataParallel(model), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    base = nn.parallel.DistributedDataParallel(llama())
    lowrank.load_adapter(base, tmp_path / "a")
    assert torch.equal(answer(base.module), answer(model))
    for add in (
        lambda: lowrank.load_adapter(base, tmp_path / "a", "other", trainable=True),
        lambda: lowrank.inject(base, LoraConfig(target_modules=["v_proj"]), "other"),
    ):
        with pytest.raises(LowrankError, match="give the adapter to the model first, then wrap it"):
            add()
