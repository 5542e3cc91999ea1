"""Killed at any moment, a merge leaves no result or a whole one, and the next start clears what was left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from killing import ARM
from lowrank.checkpoint.outputs import claimed
from lowrank.checkpoint.temporaries import temporary
from lowrank.errors import OutputError
from lowrank.merge.disk import merge_checkpoint
from lowrank.modelfiles.staging import staging
from merge_disk_models import linear_factors, write_adapter, write_base

SHAPES = {f"layers.{i}.q_proj.weight": (96, 64) for i in range(4)} | {"norm.weight": (64,), "head.weight": (300, 64)}

# One process imports; a child of it per attempt is killed at the n-th of the calls that change the disk.
EVERY_STEP = f"""{ARM}
import sys
from lowrank.merge.disk import merge_checkpoint
base, adapter, out = sys.argv[1:]

def whole():
    return sorted(os.listdir(out)) if os.path.isdir(out) else None

wanted, step = None, 0
merge_checkpoint(base, adapter, out, threads=1)
wanted = whole()
reference = open(os.path.join(out, "model.safetensors"), "rb").read()
while True:
    step += 1
    for folder, _, files in os.walk(out, topdown=False):
        for name in files:
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)
    child = os.fork()
    if child == 0:
        arm(step)
        merge_checkpoint(base, adapter, out, threads=1)
        os._exit(7)
    _, status = os.waitpid(child, 0)
    finished = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7
    state = whole()
    if state is not None:
        assert state == wanted, (step, state)
        assert open(os.path.join(out, "model.safetensors"), "rb").read() == reference, step
    if finished:
        assert state is not None
        break
print(step)
print(sorted(os.listdir(os.path.dirname(out))))
"""

# The same, killed by the clock.
ANY_TIME = """
import os, random, signal, sys, time
from lowrank.merge.disk import merge_checkpoint
base, adapter, out = sys.argv[1:]
random.seed(0)
def timed():
    started = time.perf_counter()
    merge_checkpoint(base, adapter, out, threads=2)
    return time.perf_counter() - started

def clear():
    for name in os.listdir(out) if os.path.isdir(out) else []:
        os.unlink(os.path.join(out, name))
    if os.path.isdir(out):
        os.rmdir(out)

timed(), clear()  # the first loads what the others find loaded
span = timed()
reference = open(os.path.join(out, "model.safetensors"), "rb").read()
names = sorted(os.listdir(out))
killed = 0
for attempt in range(400):  # 40 of them, and more where a busy machine lets too few be killed in time
    if attempt >= 40 and killed > 5:
        break
    clear()
    child = os.fork()
    if child == 0:
        merge_checkpoint(base, adapter, out, threads=2)
        os._exit(0)
    time.sleep(random.uniform(0, 1.5 * span))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    if os.path.isdir(out):
        assert sorted(os.listdir(out)) == names, attempt
        assert open(os.path.join(out, "model.safetensors"), "rb").read() == reference, attempt
print(killed)
"""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    base = write_base(tmp_path / "base", SHAPES, {"model_type": "llama"})
    factors = {k: v for i in range(4) for k, v in linear_factors(f"layers.{i}.q_proj", 96, 64, i).items()}
    adapter = write_adapter(tmp_path / "adapter", factors)
    (tmp_path / "results").mkdir()
    return [str(base), str(adapter), str(tmp_path / "results" / "out")]


def run(code: str, files: list[str]) -> list[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_killed_before_every_call_that_changes_the_disk(files: list[str]) -> None:
    steps, listing = run(EVERY_STEP, files)
    assert int(steps) > 20  # headers, tensors, syncs, side files, the name
    assert listing == "['out']"  # the last run cleared what those before it left


def test_killed_by_the_clock(files: list[str]) -> None:
    assert int(run(ANY_TIME, files)[0]) > 5


def test_what_a_killed_merge_left_is_cleared(files: list[str]) -> None:
    base, adapter, out = files
    left = Path(out).with_name(f".out.{dead()}-0123abcd.tmp")
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "x").write_text("x")
    (left / "model.safetensors").write_text("half")
    merge_checkpoint(base, adapter, out)
    assert sorted(os.listdir(Path(out).parent)) == ["out"]
    assert not (Path(out) / "sub").exists()


def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_two_merges_to_one_place(files: list[str]) -> None:
    """The second is told to wait; it does not clear what the first is writing."""
    base, adapter, out = files
    with claimed(out, {}) as place, staging(place) as working:
        (working / "x").write_text("x")
        with pytest.raises(OutputError, match=r"another process \(\d+\) is writing .*out now"):
            merge_checkpoint(base, adapter, out)
        assert (working / "x").exists() and not Path(out).exists()
    assert os.listdir(out) == ["x"]
    (Path(out) / "x").unlink()
    merge_checkpoint(base, adapter, out)
    assert os.listdir(Path(out).parent) == ["out"]


def test_a_link_in_the_place_of_the_working_folder_is_not_followed(files: list[str], tmp_path: Path) -> None:
    base, adapter, out = files
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("x")
    for name in (f".out.{dead()}-0123abcd.tmp", temporary(Path(out)).name):
        Path(out).with_name(name).symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="cannot write to"):
        merge_checkpoint(base, adapter, out)
    temporary(Path(out)).unlink()
    merge_checkpoint(base, adapter, out)
    assert (tmp_path / "precious" / "x").read_text() == "x"
    assert os.listdir(Path(out).parent) == ["out"]
    Path(out).with_name(".again.lock").symlink_to(tmp_path / "precious" / "x")
    with pytest.raises(OutputError, match="cannot write to"):
        merge_checkpoint(base, adapter, Path(out).with_name("again"))
    assert (tmp_path / "precious" / "x").read_text() == "x"


def test_interrupted_by_the_user(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the threads, leaves nothing, and comes through."""
    import lowrank.merge.disk.write as write

    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write.Syncer, "step", interrupt)
    monkeypatch.setattr(write, "check_finite", lambda *_: time.sleep(0.2))
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(*files)
    assert os.listdir(Path(files[2]).parent) == []


def test_same_input_same_bytes(files: list[str], tmp_path: Path) -> None:
    base, adapter, out = files
    merge_checkpoint(base, adapter, out, threads=1)
    merge_checkpoint(base, adapter, tmp_path / "again", threads=3)
    for name in os.listdir(out):
        assert (Path(out) / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
