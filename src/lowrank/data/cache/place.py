"""Where the cache is: LOWRANK_CACHE, else what the system has for caches."""

import os
import sys
from pathlib import Path

from lowrank.checkpoint.temporaries import leftovers
from lowrank.errors import OutputError

ENDING = ".lowrank-data"


def root() -> Path:
    """The folder of the cache, which need not be there."""
    if own := os.environ.get("LOWRANK_CACHE"):
        return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "lowrank"
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local")}
    return Path(os.path.expanduser(usual.get(sys.platform, "~/.cache"))) / "lowrank"


def clear() -> tuple[int, int]:
    """Delete what the cache holds, and nothing else: (files, bytes). Trainings that read it now go on undisturbed.

    What killed ones left half written is deleted too.
    """
    files, size = 0, 0
    folder = root()
    kept = sorted(folder.glob(f"*{ENDING}")) if folder.is_dir() else []
    for file in [*kept, *leftovers(folder)]:
        if not file.is_file():
            continue
        try:
            freed = file.stat().st_size
            file.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise OutputError(f"{file} cannot be deleted ({error.strerror or error})") from None
        files, size = files + 1, size + freed
    return files, size
