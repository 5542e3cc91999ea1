"""Trainings that are killed at random moments and gone on with: none may lose or change a bit.

    python tests/hostile/torture.py --kills 1000 --seed 1 [--processes 2 [--shard]]

Half of the kills come at a random time, half at a random call that changes the disk (open, write, fsync, rename, ...),
most of which are those of a checkpoint that is being written. After each, going on must begin at the last checkpoint
that was due before the last step, and what a run gives in the end must have the bytes of one that was never stopped.
Every attempt is a process of its own, forked from this one, which has imported everything; of several processes one is
killed, and the others have to end by themselves. Exit status 1, and the seed, where a law was broken.
"""

import argparse
import builtins
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["LOWRANK_CACHE"] = tempfile.mkdtemp(prefix="lowrank-torture-")

import torch

from lowrank import train
from lowrank.errors import ProcessLost
from lowrank.train import processes
from lowrank.train.reporting import Reporter
from lowrank.train.settings import TrainSettings
from train_models import completion_rows, save_llama, write_jsonl

CALLS = ["open", "write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "truncate"]
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "lowrank.json")
STEPS, EVERY = 12, 2
PATIENCE = 120.0  # seconds in which every process has to have ended
KINDS: list[dict[str, Any]] = [
    {"dropout": 0.2},
    {"dropout": 0.1, "micro_batch": 2, "gradient_checkpointing": True},
    {"dtype": "bfloat16", "dropout": 0.1},
    {"pack": True, "max_length": 40, "batch_size": 2, "dropout": 0.1},
    {"eval_data": "unseen.jsonl", "eval_every": 3, "keep": "best", "lr": 0.05},
]


class Counted(Reporter):
    """Tells the steps to the process that will have killed this one: (first, last), by memory they share."""

    def __init__(self, shared: mmap.mmap) -> None:
        self.shared = shared

    def stepped(self, step: int) -> None:
        """After every step."""
        if not any(self.shared[:4]):
            self.shared[:4] = step.to_bytes(4, "little")
        self.shared[4:8] = step.to_bytes(4, "little")


def settings(home: Path, out: Path, kind: dict[str, Any]) -> TrainSettings:
    """A short training that writes a checkpoint after every second step."""
    basic: dict[str, Any] = {"model": str(home / "llama"), "data": str(home / "rows.jsonl"), "out": str(out)}
    basic |= {"targets": "all-linear", "rank": 3, "lr": 1e-2, "batch_size": 6, "device": "cpu", "steps": STEPS}
    basic |= {"log_every": 2, "save_every": EVERY}
    kind = {name: str(home / value) if name == "eval_data" else value for name, value in kind.items()}
    return TrainSettings.model_validate(basic | kind)


def go(asked: TrainSettings, reporter: Reporter) -> None:
    """Begin the run, or go on with it where it has begun."""
    if (Path(asked.out) / "train.yaml").exists():
        train.resume(asked.out, reporter)
    else:
        train.run(asked, reporter)


def arm(call: int) -> None:
    """In this process: the call number `call` of those that change the disk is its death."""
    left = [call]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    reading = builtins.open
    writing = dying(reading)

    def opening(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return (writing if set(mode) & set("wax+") else reading)(file, mode, *rest, **options)

    builtins.open = opening


@dataclass(frozen=True)
class Crew:
    """How many processes train together, and the number of the one that dies."""

    count: int = 1
    victim: int = 0


def attempt(asked: TrainSettings, seconds: float, call: int, crew: Crew) -> tuple[bool, int, int]:
    """(whether one was killed, the first step, the last, 0 for none) of processes, one of which dies then or there."""
    shared, port = mmap.mmap(-1, 8), free_port()
    children = [start(asked, call if n == crew.victim else 0, n, crew.count, port, shared) for n in range(crew.count)]
    victim = children[crew.victim]
    timer = threading.Timer(seconds, os.kill, (victim, signal.SIGKILL)) if seconds else None
    late = threading.Timer(PATIENCE, lambda: [os.kill(child, signal.SIGABRT) for child in children])
    for each in (timer, late):
        if each is not None:
            each.start()
    statuses = {child: os.waitpid(child, 0)[1] for child in (victim, *(c for c in children if c != victim))}
    for each in (timer, late):
        if each is not None:
            each.cancel()
    died = os.WIFSIGNALED(statuses[victim]) and os.WTERMSIG(statuses[victim]) == signal.SIGKILL
    if any(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT for status in statuses.values()):
        raise AssertionError(f"a process did not end in {PATIENCE} s")
    if not died and any(statuses.values()):
        raise AssertionError("a run could not be gone on with: what it said is above")
    first, last = (int.from_bytes(shared[at : at + 4], "little") for at in (0, 4))
    return died, first, last


def start(asked: TrainSettings, call: int, number: int, count: int, port: int, shared: mmap.mmap) -> int:
    """The id of a process that trains, one of `count`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)  # after a fork torch's pool is made anew, not safely by several threads
        if count > 1:
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            os.environ.update(where, RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count))
        if call:
            arm(call)
        with processes.joined("cpu"):
            go(asked, Counted(shared) if number == 0 else Reporter())
        status = 0
    except ProcessLost:
        pass  # another one died, as it was to
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def adapter(out: Path) -> dict[str, bytes]:
    """The result."""
    return {name: (out / name).read_bytes() for name in ADAPTER}


def torture(home: Path, kills: int, seed: int, count: int, more: dict[str, Any]) -> int:
    """Kill so many processes, of `count` that train together, all with `more` settings.

    Returns how many runs came to their end. Raises AssertionError where a law is broken.
    """
    chosen = random.Random(seed)
    out = home / "run"
    wholes: list[tuple[dict[str, bytes], float]] = []
    kinds = [kind | more for kind in KINDS]
    for number, kind in enumerate(kinds):
        began = time.monotonic()
        attempt(settings(home, home / f"whole{number}", kind), 0, 0, Crew(count))
        wholes.append((adapter(home / f"whole{number}"), time.monotonic() - began))
    killed = ended = 0
    while killed < kills:
        number = chosen.randrange(len(kinds))
        whole, took = wholes[number]
        asked, reached = settings(home, out, kinds[number]), 0
        while True:
            by_time = chosen.random() < 0.5
            seconds, call = (chosen.uniform(0.01, took), 0) if by_time else (0.0, chosen.randrange(1, 120))
            died, first, last = attempt(asked, seconds, call, Crew(count, chosen.randrange(count)))
            due = max(0, reached - 1) // EVERY * EVERY
            assert not first or first > due, f"step {reached} was taken, and going on began at step {first}"
            reached = max(reached, last)
            if not died:
                break
            killed += 1
            if killed % 100 == 0:
                print(f"{killed} killed, {ended} runs ended", flush=True)
        assert adapter(out) == whole, f"other bytes: {kinds[number]}"
        left = sorted(os.listdir(out))
        assert left == sorted([*ADAPTER, "README.md", "log.jsonl", "run.json", "train.yaml"]), left
        shutil.rmtree(out)
        ended += 1
    return ended


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--shard", action="store_true", help="each holds a part of the base")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="lowrank-torture-"))
    try:
        save_llama(home / "llama")
        write_jsonl(home / "rows.jsonl", completion_rows(40))
        write_jsonl(home / "unseen.jsonl", completion_rows(5, seed=5))
        ended = torture(home, asked.kills, asked.seed, asked.processes, {"shard": True} if asked.shard else {})
    except AssertionError as error:
        print(f"seed {asked.seed}: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(os.environ["LOWRANK_CACHE"], ignore_errors=True)
    print(f"{asked.kills} killed, {ended} runs ended, each with the bytes of one that was never stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
