"""The README's map of the folders says what the source says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readmes_map_is_todays() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "file_tree.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
