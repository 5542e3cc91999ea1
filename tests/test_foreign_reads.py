"""Laws of the source itself: files of others are read within bounds, and what is told goes by one printer.

`lowrank.files` is the one place that opens what somebody else wrote. What reads by itself is listed with its reason.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lowrank

SOURCE = Path(lowrank.__file__).parent
READS = {"json.load", "json.loads", "open", "safe_open", "mmap.mmap", "torch.load", "yaml.load", "yaml.safe_load"}
READS |= {"pickle.load", "pickle.loads", "load_file", "os.open"}
METHODS = {"read_text", "read_bytes", "open"}

ALLOWED = {
    "checkpoint/atomic.py": "writes: temporary files and folders of its own",
    "checkpoint/locks.py": "writes: locks",
    "checkpoint/read.py": "pickles, by weights_only, where the user allows them",
    "adapters/convert/unpickle.py": "syncs what it wrote",
    "cli/__init__.py": "/dev/null",
    "data/cache/keys.py": "hashes data files and a tokenizer's, in pieces",
    "data/cache/rows.py": "JSON of its own, under a checksum",
    "data/cache/spool.py": "writes, for this process alone",
    "data/cache/store.py": "the same, in a folder that nobody else may write to",
    "data/chat/template.py": "a file that the user names, and one that ships with lowrank",
    "data/readers/json_rows.py": "rows, with bounds of its own: a data file is read as a stream, and may be any size",
    "data/readers/opening.py": "the same",
    "data/shapes/tools.py": "a field of a row",
    "kernels/processor.py": "/proc/cpuinfo",
    "merge/disk/card.py": "hashes files that were read before, in pieces",
    "merge/disk/sidefiles.py": "writes",
    "merge/disk/verify.py": "reads the result",
    "merge/disk/write.py": "writes; the base's bytes by pread at places that were checked",
    "modelfiles/blocks.py": "the base's bytes by pread at places that were checked",
    "modelfiles/bytes.py": "clones a weight file that was checked",
    "train/memory.py": "/proc/self/status",
    "train/processes.py": "bytes of the other processes of the same training",
    "train/state/identity.py": "hashes data files, in pieces",
    "study/estimate/machines.py": "/proc/meminfo",
    "train/config_file.py": "settings of the user, of a million bytes at most",
    "train/reporting.py": "writes: the log",
}
PRINTERS = {
    "cli/say.py": "the printer",
    "cli/__init__.py": "errors and warnings, through `short`",
    "cli/chat.py": "the error of a turn, through `short`; which words are commands",
    "cli/pulse.py": "the line that says what is being done",
    "adapters/convert/unpickle.py": "JSON for the process that started it",
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file; of a method of anything but a module ".name"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name):
                yield function.id, node
            elif isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                yield f"{owner}.{function.attr}", node


def reading(name: str) -> bool:
    return name in READS or ("." in name and name.partition(".")[2] in METHODS and name != "os.open")


def found(wanted) -> Counter[str]:
    files = (path for path in SOURCE.rglob("*.py") if path.parent.name != "files")
    return Counter(str(path.relative_to(SOURCE)) for path in files for name, _ in calls(path) if wanted(name))


def test_files_of_others_are_read_in_one_place():
    """A new reader belongs on `lowrank.files`; what has a good reason not to goes on the list, with it."""
    assert set(found(reading)) == set(ALLOWED)


def test_what_is_told_goes_by_the_printer():
    """`cli.say` escapes what commands a terminal; print and rich's own Text do not."""
    assert set(found(lambda name: name == "print")) == set(PRINTERS)
    texts = {file: count for file, count in found(lambda name: name == "Text").items() if file.startswith("cli/")}
    assert texts == {"cli/say.py": 1, "cli/data_display.py": 1}  # the latter is an empty one
