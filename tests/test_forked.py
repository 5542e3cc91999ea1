"""Work shared out among forks: in order, whatever their number; what goes wrong is said, and nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children

import pytest

from lowrank.data import forked
from lowrank.data.forked import in_order, useful
from lowrank.errors import DataError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("parts", [0, 1, 3, 40])
def test_results_come_in_the_order_of_the_parts(parts, processes):
    known = os.getpid()
    found = list(in_order(lambda number: (number * number, os.getpid()), parts, processes))
    assert [square for square, _ in found] == [number * number for number in range(parts)]
    assert len({pid for _, pid in found} - {known}) == min(parts, processes)
    assert active_children() == []


def test_what_a_part_raises_is_raised_in_its_turn():
    def work(number):
        if number == 7:
            raise DataError("row 7 is bad")
        return number

    found = in_order(work, 20, 3)
    assert [next(found) for _ in range(7)] == list(range(7))
    with pytest.raises(DataError, match="row 7 is bad"):
        next(found)
    assert active_children() == []


def test_a_process_that_is_killed_is_said():
    def work(number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(DataError, match="was ended from outside, perhaps for want of memory; TOKENIZERS_PARALLELISM"):
        list(in_order(work, 20, 2))
    assert active_children() == []


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_fewer_do_where_the_system_allows_no_more(allowed, monkeypatch):
    fork = forked._fork

    def refusing(work, pipes):
        if len(pipes) == allowed:
            raise OSError("Resource temporarily unavailable")
        return fork(work, pipes)

    monkeypatch.setattr(forked, "_fork", refusing)
    found = list(in_order(lambda number: (number, os.getpid()), 9, 4))
    assert [number for number, _ in found] == list(range(9))
    assert len({pid for _, pid in found}) == max(1, allowed)


def test_who_does_not_want_the_rest_leaves_nobody_behind():
    found = in_order(lambda number: number, 1000, 2)
    assert next(found) == 0
    found.close()
    assert active_children() == []


def test_forks_end_with_the_process_that_made_them_however_it_ends():
    code = """
import os, time
from lowrank.data.forked import in_order
for number, pid in enumerate(in_order(lambda part: os.getpid(), 9, 3)):
    print(pid, flush=True)
    time.sleep(60 * (number == 2))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(3)]
        process.kill()
    end = time.monotonic() + 20
    while any(map(_runs, pids)):
        assert time.monotonic() < end
        time.sleep(0.02)


def _runs(pid):
    """Whether it does something: one that has ended, and that nobody has asked for, is still in the table."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_tokenizers_own_switches_hold(monkeypatch):
    monkeypatch.delenv(forked.SWITCH, raising=False)
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    assert useful() == 3
    list(in_order(lambda number: number, 3, 2))
    assert forked.SWITCH not in os.environ
    monkeypatch.setenv(forked.SWITCH, "false")
    assert useful() == 1


@pytest.mark.parametrize(("number", "here", "wanted"), [("0", "3", 8), ("1", "3", 2), ("2", "9", 1), ("1", None, 4)])
def test_several_processes_that_a_launcher_started_share_the_cores(number, here, wanted, monkeypatch):
    """The first one goes ahead of the others, alone; those work at the same time."""
    monkeypatch.delenv(forked.SWITCH, raising=False)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert useful() == 8
    for name, value in {"RANK": number, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": here}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert useful() == wanted
