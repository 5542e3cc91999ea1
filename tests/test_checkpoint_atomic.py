"""Writing is all or nothing: full disks, limits and kills leave the old adapter whole and no rubbish."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lowrank
from checkpoint_models import answer, contents, disturb, llama
from lowrank import LoraConfig
from lowrank.checkpoint import atomic
from lowrank.errors import CheckpointError

OLD = {"weights": b"old" * 1000, "config": b"old"}
NEW = {"weights": b"new" * 2000, "config": b"new"}


@pytest.fixture(params=["swap", "each", "beside"])
def folder(request, tmp_path, monkeypatch):
    """A folder with old files that is replaced as a whole, file by file, or file by file since it holds others too."""
    folder = tmp_path / "adapter"
    atomic.write_folder(folder, OLD)
    if request.param == "each":
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    if request.param == "beside":
        (folder / "log.jsonl").write_text("mine")
    return folder


def is_old(folder: Path) -> bool:
    """True where the old files and nothing temporary are there."""
    files = contents(folder)
    files.pop("log.jsonl", None)
    return files == OLD and os.listdir(folder.parent) == ["adapter"]


def test_new_files_take_the_old_ones_places(folder):
    others = set(os.listdir(folder)) - set(OLD)
    atomic.write_folder(folder, NEW)
    assert {name: data for name, data in contents(folder).items() if name in NEW} == NEW
    assert set(os.listdir(folder)) == set(NEW) | others and os.listdir(folder.parent) == ["adapter"]


def test_a_full_disk_leaves_the_old_files(folder, monkeypatch):
    real = atomic._write_synced

    def full(path, data):
        real(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for failing in NEW:

        def write(path, data, failing=failing):
            return (full if failing in path.name else real)(path, data)

        monkeypatch.setattr(atomic, "_write_synced", write)
        with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device.*untouched"):
            atomic.write_folder(folder, NEW)
        assert is_old(folder)


def test_a_failing_sync_leaves_the_old_files(folder, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        atomic.write_folder(folder, NEW)
    assert is_old(folder)


def test_an_interrupt_leaves_the_old_files(folder, monkeypatch):
    def interrupt(path, data):
        path.write_bytes(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_write_synced", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_folder(folder, NEW)
    assert is_old(folder)


def test_the_kernels_own_limit_leaves_the_old_adapter_whole(tmp_path):
    """The process may not write a file of more than 600 bytes: a real error of a real write."""
    model = llama()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    disturb(model)
    lowrank.save_adapter(model, tmp_path / "adapter")
    before, old = contents(tmp_path / "adapter"), answer(model)
    disturb(model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            lowrank.save_adapter(model, tmp_path / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path / "adapter") == before and os.listdir(tmp_path) == ["adapter"]
    loaded = llama()
    lowrank.load_adapter(loaded, tmp_path / "adapter")
    assert answer(loaded).equal(old)


KILLED = """
import sys
from pathlib import Path
from lowrank.checkpoint.atomic import write_folder
folder = Path(sys.argv[1])
for i in range(100000):
    write_folder(folder, {name: bytes([65 + i % 26]) * 20000 for name in ("weights", "config", "more")})
    print(i, flush=True)
"""


def test_a_kill_at_any_moment_leaves_one_whole_set(tmp_path):
    for round_number in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "adapter")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.013 * (round_number + 1))
        process.kill()
        process.communicate()
        files = contents(tmp_path / "adapter")
        assert set(files) == {"weights", "config", "more"}
        assert len(set(files.values())) == 1 and len(files["more"]) == 20000


def test_the_first_save_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(atomic, "_write_synced", full)
    with pytest.raises(CheckpointError, match="full"):
        atomic.write_folder(tmp_path / "new" / "adapter", NEW)
    assert os.listdir(tmp_path / "new") == []


def test_a_link_stays_a_link_and_rights_stay(tmp_path):
    (tmp_path / "real").mkdir(mode=0o750)
    os.symlink(tmp_path / "real", tmp_path / "link")
    atomic.write_folder(tmp_path / "link", OLD)
    atomic.write_folder(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == NEW
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o750


def test_one_file_is_replaced_or_left(tmp_path):
    path = tmp_path / "state.json"
    atomic.write_file(path, b"old")
    with pytest.raises(RuntimeError), atomic.replacing(path) as beside:
        beside.write_bytes(b"half")
        raise RuntimeError
    assert contents(tmp_path) == {"state.json": b"old"}
    atomic.write_file(path, b"new")
    assert contents(tmp_path) == {"state.json": b"new"}
