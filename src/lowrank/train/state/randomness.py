"""The random states of this process: torch's on the CPU and the device, numpy's and Python's."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank.errors import CheckpointError, short
from lowrank.train.state.value import RandomFacts

WORDS = 3  # the version of Python's own tuple that has these words


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All random numbers start at the seed inside, and go on outside as if nothing had been.

    torch's are the ones that we draw; some models drop layers or mask inputs by Python's or numpy's.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):  # unless they are named it warns of many
            _seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def reseed(seed: int, process: int) -> None:
    """Other random numbers for every process but the first, so that dropout differs among them; the first goes on."""
    if process:
        _seed((seed + process * 1_000_003) % 2**63)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def drawn(device: torch.device) -> tuple[dict[str, Tensor], RandomFacts]:
    """Where the random numbers are: torch's as tensors, Python's and numpy's as facts."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type != "cpu":
        tensors[device.type] = _module(device).get_rng_state(device)
    _, words, normal = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    inner = numpy["state"]
    facts = RandomFacts(
        python=(list(words), normal),
        numpy=(inner["key"].tolist(), int(inner["pos"]), int(numpy["has_gauss"]), float(numpy["gauss"])),
    )
    return tensors, facts


def draw_on(device: torch.device, tensors: Mapping[str, Tensor], facts: RandomFacts) -> None:
    """In place: all random numbers go on from there. A device that the tensors do not know keeps its own.

    Raises CheckpointError for states that these generators cannot be in.
    """
    words, normal = facts.python
    keys, place, has_gauss, gauss = facts.numpy
    try:
        torch.set_rng_state(tensors["torch"])
        if device.type in tensors:
            _module(device).set_rng_state(tensors[device.type], device)
        random.setstate((WORDS, tuple(words), normal))
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise CheckpointError(f"the checkpoint's random states are none ({short(error, 100)})") from None


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
