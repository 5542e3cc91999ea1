"""What several processes of one training know together; a process that is alone knows it by itself.

Each takes its own rows of a step. A gradient is that of the sum of losses over its rows, divided by what is trained in
the rows of all: added up over the processes (not averaged) they are the gradient of the whole step. Every process holds
all that is trained, whole, and takes the same step with the same gradient. The first one alone writes and speaks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lowrank import launch
from lowrank.errors import ConfigError, ProcessLost

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # how long others may read, tokenise or save; one that died is noticed at once


@contextmanager
def joined(device: str | None = None) -> Iterator[None]:
    """The processes that torchrun started, joined for the block; nothing for one that is alone or has joined already.

    device: what --device says. Raises ConfigError where a launcher other than torchrun started several.
    """
    if lacking := launch.lacking():
        raise ConfigError(
            f"{lacking}: several processes of one training are started by torchrun --nproc-per-node N -m lowrank train "
            "..., and one by no launcher"
        )
    if launch.count() == 1 or grouped():
        yield
        return
    gpu = torch.cuda.is_available() and device != "cpu"
    if gpu:
        torch.cuda.set_device(launch.number_here() % torch.cuda.device_count())
    with told():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def grouped() -> bool:
    """Whether there are others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if grouped() else 1


def number() -> int:
    """Which process this is, from 0."""
    return distributed.get_rank() if grouped() else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return number() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this process's, in their order: every n-th."""
    return items[number() :: count()]


@contextmanager
def first_ahead() -> Iterator[None]:
    """The first process goes through the block before the others do: what it leaves on the disk they find there."""
    if grouped() and not is_first():
        wait()
    yield
    if grouped() and is_first():
        wait()


def wait() -> None:
    """Until every process is here."""
    if grouped():
        with told():
            distributed.all_reduce(torch.zeros(1))


def summed(count: int) -> int:
    """The counts of all processes, added up. Every process of the group must call it, as all that follows here."""
    return int(_sum(torch.tensor(count))) if grouped() else count


def summed_float(value: float) -> float:
    """The same for a number, in float64."""
    return float(_sum(torch.tensor(value, dtype=torch.float64))) if grouped() else value


def largest(value: int) -> int:
    """The largest of what the processes give."""
    if not grouped():
        return value
    return int(_sum(torch.tensor(value), distributed.ReduceOp.MAX))


def first_says(value: bool) -> bool:
    """What the first process gives: clocks and disks differ."""
    return bool(largest(int(value if is_first() else False)))


def add_up(parameters: Sequence[Tensor]) -> None:
    """In place: the gradients of all processes, added up in one flat tensor a dtype; None where no process has any."""
    if not grouped():
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for of_a_kind in kinds.values():
        _add_up(of_a_kind)


def _add_up(parameters: Sequence[Tensor]) -> None:
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = own[0].new_tensor([p.grad is not None for p in parameters])
    flat = _sum(torch.cat([there, *(gradient.flatten() for gradient in own)]))
    there, *sums = flat.split([len(own), *(gradient.numel() for gradient in own)])
    for parameter, has, total in zip(parameters, there.tolist(), sums, strict=True):
        parameter.grad = total.view_as(parameter) if has else None


@torch.no_grad()
def same_everywhere(tensors: Sequence[Tensor]) -> None:
    """In place: the first process's values, in all."""
    if grouped():
        for tensor in tensors:
            with told():
                distributed.broadcast(tensor.data, 0)


def gathered(value: Any) -> list[Any]:
    """What JSON can say, of every process, in order."""
    if not grouped():
        return [value]
    return [json.loads(part) for part in _gathered(json.dumps(value).encode())]


def gathered_tensors(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Named tensors of every process, in order; not all have to have the same ones."""
    if not grouped():
        return [dict(tensors)]
    from safetensors.torch import load, save

    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    return [{name: tensor.to(device) for name, tensor in load(part).items()} for part in _gathered(save(own))]


def _gathered(payload: bytes) -> list[bytes]:
    """Those of every process, of whatever length."""
    own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    sizes = torch.zeros(count(), dtype=torch.int64)
    sizes[number()] = len(own)
    sizes = _sum(sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(own)] = own
    found = [torch.empty_like(padded) for _ in range(count())]
    with told():
        distributed.all_gather(found, padded)
    return [part[: int(size)].numpy().tobytes() for part, size in zip(found, sizes, strict=True)]


def _sum(tensor: Tensor, how: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM) -> Tensor:
    with told():
        distributed.all_reduce(tensor, how)
    return tensor


@contextmanager
def told() -> Iterator[None]:
    """A group that broke, as a sentence."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own errors are of that class
        raise ProcessLost(
            f"process {launch.number()} of {launch.count()}, counted from 0, lost another one: it was killed, "
            "or cannot be reached any more"
        ) from error
