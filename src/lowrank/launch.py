"""Which of several processes this one is, as the launcher that started it says (torchrun's variables)."""

import os

COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how launchers say how many processes they started
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun says beside that


def lacking() -> str | None:
    """Of a process that is one of several, what its launcher does not say and torchrun would; None where that is well.

    As words for a sentence: "OMPI_COMM_WORLD_SIZE is 4 and RANK is not set".
    """
    several = [name for name in COUNTS if _whole(name, 1) > 1]
    absent = [name for name in ("WORLD_SIZE", *NEEDED) if name not in os.environ]
    if not several or not absent:
        return None
    return f"{several[0]} is {os.environ[several[0]]} and {absent[0]} is not set"


def number() -> int:
    """Counted from 0 over all nodes; 0 for a process that is alone."""
    return _whole("RANK", 0)


def number_here() -> int:
    """Counted from 0 on this machine."""
    return _whole("LOCAL_RANK", 0)


def count() -> int:
    """How many processes there are; 1 for one that is alone."""
    return max(1, _whole("WORLD_SIZE", 1))


def count_here() -> int:
    """How many of them there are on this machine; all, where the launcher does not say."""
    return max(1, _whole("LOCAL_WORLD_SIZE", count()))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return number() == 0


def _whole(name: str, default: int) -> int:
    said = os.environ.get(name, "")
    return int(said) if said.isascii() and said.isdigit() else default
