"""The last net: an error that nobody foresaw becomes one sentence, and its traceback a file that the sentence names."""

import os
import platform
import sys
import tempfile
import traceback
from importlib.metadata import version

DEBUG = "LOWRANK_DEBUG"  # set to anything: the traceback is shown, not put away


def caught(error: Exception) -> str:
    """What to say of an error that is none of ours; its traceback is written to a file of the temporary folder."""
    if isinstance(error, MemoryError):
        return "the memory does not suffice for this"
    name = type(error).__name__
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
        return f"this failed in a way that was not foreseen ({name}): the traceback is above"
    return (
        f"this failed in a way that was not foreseen ({name}: {_first_line(error)}): {_kept(error)}, and please report "
        "it with that"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["without a word"]
    return lines[0] if len(lines[0]) <= 120 else lines[0][:119] + "…"


def _kept(error: Exception) -> str:
    """Where the traceback is."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lowrank-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(_record(error))
    except OSError:
        return f"its traceback could not be written to a file, {DEBUG}=1 shows it"
    return f"its traceback is in {file.name}"


def _record(error: Exception) -> str:
    torch = sys.modules.get("torch")
    where = f"lowrank {version('lowrank')}, Python {platform.python_version()}, {platform.platform()}"
    with_torch = f", torch {torch.__version__}" if torch else ""
    return f"{where}{with_torch}\n{sys.argv}\n\n{''.join(traceback.format_exception(error))}"
