"""Two processes with four rows each take the step that one takes with eight."""

import os

import pytest
import torch
from torch import distributed, multiprocessing

from lowrank import LoraConfig, inject
from lowrank.data.batches import collate
from lowrank.data.tokens import IGNORED, Example
from lowrank.train.evaluation import Measure
from lowrank.train.loop import Loop
from lowrank.train.losses import LOSSES
from lowrank.train.metrics import FIGURES
from lowrank.train.models import load_causal
from lowrank.train.reporting import Reporter
from lowrank.train.settings import LoopSettings
from train_models import save_llama

# rows of very different counts of trained tokens: a mean of means would be another gradient
ROWS = [Example(list(range(1, 4 + n)), [IGNORED] * 2 + list(range(3, 4 + n))) for n in (1, 12, 2, 9, 3, 1, 1, 7)]


class Keeps:
    """An optimiser that takes no step, and keeps the gradients of the first it was asked for."""

    rate = 0.0

    def __init__(self, parameters):
        self.parameters = parameters

    def step(self, factor):
        self.gradients = [p.grad.clone() for p in self.parameters]
        return 0.0


def gradients(folder, rows, micro):
    """Of one step over `rows`, in this process."""
    torch.manual_seed(0)
    model = load_causal(folder, torch.float32)
    inject(model, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", init_lora_weights="random"))
    measure = Measure(lambda part: collate(part, 0, torch.device("cpu"), True), LOSSES["text"], FIGURES["text"])
    settings = LoopSettings(batch_size=len(rows), micro_batch=micro, steps=1)
    loop = Loop(model, rows, [], measure, settings, Reporter())
    optimiser = Keeps(loop.state.optimiser.parameters)
    loop.state.optimiser = optimiser
    loop.run()
    return optimiser.gradients


def work(rank, folder, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    own = gradients(folder, ROWS, 2)
    if rank == 0:
        torch.save(own, f"{out}/gradients.pt")
    distributed.destroy_process_group()
    os._exit(0)  # torch's own threads may abort a process that ends slowly


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_take_the_step_of_one(tmp_path):
    folder = save_llama(tmp_path / "llama")
    whole = gradients(folder, ROWS, None)
    multiprocessing.spawn(work, (folder, tmp_path), nprocs=2)
    for found in (torch.load(tmp_path / "gradients.pt"), gradients(folder, ROWS, 2)):
        for cut, of_all in zip(found, whole, strict=True):
            assert (cut - of_all).abs().max() < 1e-5 * of_all.abs().max()
