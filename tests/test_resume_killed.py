"""Processes that train are killed by the system, and no bit is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed


def check_killed(*how: str) -> None:
    script = Path(__file__).parent / "hostile" / "torture.py"
    line = [sys.executable, str(script), "--seed", "7", *how]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_killed_at_twenty_random_moments() -> None:
    """At random times, and at random calls that change the disk: those of a checkpoint that is written, mostly."""
    check_killed("--kills", "20")


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("how", [(), ("--shard",)], ids=["the whole base each", "a part of the base each"])
def test_one_of_two_processes_is_killed_at_ten_random_moments(how: tuple[str, ...]) -> None:
    """The other one ends by itself, and two that go on give the bytes of two that were never stopped."""
    check_killed("--kills", "10", "--processes", "2", *how)
