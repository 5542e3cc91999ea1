"""Processes that train are killed by the system, and no bit is lost."""

import os
import subprocess
import sys
from pathlib import Path


def test_killed_at_twenty_random_moments() -> None:
    """At random times, and at random calls that change the disk: those of a checkpoint that is written, mostly."""
    script = Path(__file__).parent / "hostile" / "torture.py"
    line = [sys.executable, str(script), "--kills", "20", "--seed", "7"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
