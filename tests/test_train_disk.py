"""What a disk does to a training: nothing trained is lost to it, and nothing blocks the next start."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank import load_adapter, train
from lowrank.checkpoint import atomic, outputs, read_adapter
from lowrank.data.recipe import read_recipe
from lowrank.errors import CheckpointError, ConfigError, Diverged, LowrankWarning, OutputError
from lowrank.train.models import load_causal
from lowrank.train.reporting import Log, Progress, Reporter
from lowrank.train.settings import TrainSettings
from output_cases import snapshot
from train_models import completion_rows, save_llama, write_jsonl

DONE = {"adapter_config.json", "adapter_model.safetensors", "lowrank.json"}
DONE |= {"README.md", "log.jsonl", "run.json", "train.yaml"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "llama")
    write_jsonl(home / "rows.jsonl", completion_rows(24))
    return home


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder for temporary files."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    return tmp_path / "elsewhere"


def settings(home: Path, out: Path, **changes: Any) -> TrainSettings:
    basic: dict[str, Any] = {"model": str(home / "llama"), "data": str(home / "rows.jsonl"), "out": str(out)}
    return TrainSettings.model_validate({**basic, "steps": 3, "log_every": 1, "device": "cpu", **changes})


class At(Reporter):
    """Does something to the disk before the last step."""

    def __init__(self, what: Callable[[], object]) -> None:
        self.what = what

    def stepped(self, step: int) -> None:
        if step == 2:
            self.what()


def full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that fills the disk of `folder`, for the files of adapters and records."""
    real = atomic._write_synced

    def write(path: Path, data: bytes) -> None:
        if folder in path.parents:
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    return lambda: monkeypatch.setattr(atomic, "_write_synced", write)


def test_a_disk_that_is_full_at_the_end(
    home: Path, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter goes elsewhere, whole, and is what it would have been; the next start is not blocked."""
    out = tmp_path / "disk" / "run"
    with pytest.raises(OutputError, match=r"No space left on device\); what was trained is in .*elsewhere") as caught:
        train.run(settings(home, out), At(full_disk(tmp_path / "disk", monkeypatch)))
    monkeypatch.undo()
    (kept,) = elsewhere.iterdir()
    assert str(kept) in str(caught.value) and "\n" not in str(caught.value)
    assert set(os.listdir(kept)) == DONE and read_recipe(kept) is not None
    assert set(snapshot(tmp_path / "disk")) == {"run", "run/train.yaml", "run/log.jsonl"}
    train.run(settings(home, out))
    there, here = ((folder / "adapter_model.safetensors").read_bytes() for folder in (kept, out))
    assert there == here
    load_adapter(load_causal(home / "llama", torch.float32), kept)


def test_no_disk_takes_it(home: Path, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    with pytest.raises(OutputError, match="no other place could be written either"):
        train.run(settings(home, tmp_path / "run"), At(full_disk(tmp_path, monkeypatch)))
    left = {"run", "run/train.yaml", "run/log.jsonl", "home", "elsewhere"}
    assert set(snapshot(tmp_path)) == left and os.listdir(elsewhere) == []


def test_a_folder_that_vanishes(home: Path, tmp_path: Path) -> None:
    """The log is not: one warning. The result is."""
    out = tmp_path / "deep" / "run"
    with pytest.warns(LowrankWarning, match=r"log\.jsonl: cannot be written \(No such file.*goes on") as caught:
        train.run(settings(home, out), At(lambda: shutil.rmtree(out)))
    assert len([one for one in caught if issubclass(one.category, LowrankWarning)]) == 1
    assert set(os.listdir(out)) == DONE - {"log.jsonl", "train.yaml"}
    load_adapter(load_causal(home / "llama", torch.float32), out)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_warns_once() -> None:
    log = Log(Path("/dev/full"))
    line = Progress(1, 0.5, 1e-3, 10.0, 5, 6)
    with pytest.warns(LowrankWarning, match=r"/dev/full: cannot be written \(No space left on device\)") as caught:
        log.progressed(line), log.progressed(line)
    assert len(caught) == 1


def test_a_line_of_the_log_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, real, calls = Log(tmp_path / "log.jsonl"), os.write, []

    def half(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) % 2 == 0:
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, data[:20])

    log.progressed(Progress(1, 0.5, 1e-3, 10.0, 5, 6))
    monkeypatch.setattr(os, "write", half)
    with pytest.warns(LowrankWarning, match="full"):
        log.progressed(Progress(2, 0.5, 1e-3, 10.0, 5, 6))
    monkeypatch.setattr(os, "write", real)
    log.progressed(Progress(3, 0.5, 1e-3, 10.0, 5, 6))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 KiB, less than the model."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(tmp_path / "disk")]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("only root may mount a small disk")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_real_full_disk_under_a_whole_model(
    home: Path, small_disk: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors and tokenizers each say it in a way of their own; none of it is a traceback."""
    with pytest.raises(OutputError, match="make room"):
        train.run(settings(home, small_disk / "run", full=True))
    assert os.listdir(small_disk) == []
    monkeypatch.setattr(outputs, "SPARE", -(10**9))
    with pytest.raises(OutputError, match=r"No space left on device.*what was trained is in"):
        train.run(settings(home, small_disk / "run", full=True))
    assert set(snapshot(small_disk)) == {"run", "run/train.yaml", "run/log.jsonl"}
    (kept,) = elsewhere.iterdir()
    load_causal(kept, torch.float32)
    with pytest.raises(OutputError, match="No space left on device"):
        atomic.write_file(small_disk / "big", bytes(10**6))
    assert set(snapshot(small_disk)) == {"run", "run/train.yaml", "run/log.jsonl"}


def diverge() -> None:
    raise Diverged("step 2: the loss is nan")


def test_a_run_that_diverged_does_not_block_the_next(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Diverged):
        train.run(settings(home, out), At(diverge))
    assert set(os.listdir(out)) == {"train.yaml", "log.jsonl"}
    train.run(settings(home, out, lr=1e-3))
    assert set(os.listdir(out)) == DONE and os.listdir(tmp_path) == ["run"]
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    with pytest.raises(OutputError, match="not empty"):
        train.run(settings(home, out))


def test_the_recipe_is_there_before_the_adapter_is(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment does a folder load as an adapter that does not say how it was trained."""
    real, seen = os.replace, []

    def look(source: str, target: str) -> None:
        real(source, target)
        folder = Path(target).parent
        seen.append(((folder / "adapter_config.json").exists(), (folder / "run.json").exists()))

    monkeypatch.setattr(os, "replace", look)
    train.run(settings(home, tmp_path / "run"))
    assert (True, False) not in seen and seen[-1] == (True, True) and (False, True) in seen


def test_what_a_run_had_ready_when_it_was_killed_is_put_in_place(home: Path, tmp_path: Path) -> None:
    """Killed between two of the last renames: the next start finishes them, and leaves the result alone."""
    out = tmp_path / "run"
    train.run(settings(home, out))
    whole = snapshot(out)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = out / f".result.{process.pid}-0123abcd.tmp"
    left.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).rename(left / name)
    with pytest.raises(OutputError, match="not empty"):
        train.run(settings(home, out))
    assert snapshot(out) == whole


def test_an_adapter_that_has_lost_its_recipe_says_so(home: Path, tmp_path: Path) -> None:
    train.run(settings(home, tmp_path / "run"))
    (tmp_path / "run" / "run.json").unlink()
    with pytest.warns(LowrankWarning, match=r"has lost its run\.json"):
        assert read_recipe(tmp_path / "run") is None


def test_a_run_that_has_not_come_to_its_end_is_told_from_an_adapter(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train.run(settings(home, out))
    for name in DONE - {"log.jsonl", "train.yaml"}:
        (out / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_recipe(out) is None
    with pytest.raises(CheckpointError, match=f"not come to its end: go on with lowrank train --resume {out}"):
        read_adapter(out)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_of_several_processes_is_refused(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=f"{name} is 2"):
        train.run(settings(home, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(name, "1")
    train.run(settings(home, tmp_path / "run"))
