"""Killed at any moment, a command leaves a whole result or none, and the next start clears what is left."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from killing import ARM
from lowrank import cli
from output_cases import COMMANDS, ENDINGS, FILES, make_inputs, snapshot

# One process imports; a child of it per attempt is killed at a call that changes the disk, each time a later one.
EVERY_STEP = f"""{ARM}
import shutil, sys
from lowrank import cli
every, line, out, last = int(sys.argv[1]), sys.argv[2].split(), sys.argv[3], sys.argv[4]

def run():
    return cli.main([*line, out])

def done():
    return os.path.exists(os.path.join(out, last) if last else out)

def names():
    return sorted(n for n in os.listdir(out) if n[0] != ".") if os.path.isdir(out) else None

assert run() == 0
whole, step, killed = names(), 1 - every, 0
while True:
    step += every
    if done():
        shutil.rmtree(out) if os.path.isdir(out) else os.unlink(out)
    child = os.fork()
    if child == 0:
        arm(step)
        os._exit(70 + run())
    _, status = os.waitpid(child, 0)
    if done():
        assert names() == whole, (step, names())
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 70:
        break
    if os.WIFEXITED(status):  # refused, since what the last one had trained was found and put in place
        assert done() and sys.argv[2].startswith("train"), (step, status)
    else:
        killed += 1
print(killed)
print(sorted(os.listdir(os.path.dirname(out))), done())
"""
LAST = {"train": "adapter_config.json", "train --full": "model.safetensors", "dimension": "dimension.html"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("crash")
    make_inputs(home)
    return home


def kill_at_every(every: int, name: str, home: Path, tmp_path: Path) -> int:
    """How many attempts were killed; asserts that nothing but the result is left in the end."""
    out = tmp_path / f"out{ENDINGS.get(name, '')}"
    before = snapshot(home)
    done = subprocess.run(
        [sys.executable, "-c", EVERY_STEP, str(every), COMMANDS[name], str(out), LAST.get(name, "")],
        capture_output=True,
        text=True,
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *_, killed, listing = done.stdout.splitlines()
    assert listing == f"['{out.name}'] True"
    assert not [path for path in out.rglob(".*") if out.is_dir()]
    assert snapshot(home) == before
    return int(killed)


@pytest.mark.parametrize("name", ["combine", "convert to gguf", "train"])
def test_killed_at_some_calls_that_change_the_disk(name: str, home: Path, tmp_path: Path) -> None:
    assert kill_at_every(7, name, home, tmp_path) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_call_that_changes_the_disk(name: str, home: Path, tmp_path: Path) -> None:
    assert kill_at_every(1, name, home, tmp_path) >= (8 if name in FILES else 10)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_takes_nothing_is_one_sentence(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process may not write a file of more than 20 bytes: a real error of every real write."""
    monkeypatch.chdir(home)
    out = tmp_path / f"out{ENDINGS.get(name, '')}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        status = cli.main([*COMMANDS[name].split(), str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lowrank: error")]
    assert status == 2 and len(said) == 1 and str(out) in said[0] and "/." not in said[0], said
    assert "File too large" in said[0], said
    assert not {path for path in snapshot(tmp_path) if path not in ("out", "out/log.jsonl")}


def test_a_training_that_is_asked_to_end_says_how_it_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step is finished and written down; one line, its own status, nothing hidden; and that line goes on."""
    out = tmp_path / "out"
    line = COMMANDS["train"].replace("--steps 1", "--steps 100000 --log-every 1").split()
    process = subprocess.Popen(
        [sys.executable, "-m", "lowrank", *line, str(out)],
        cwd=home,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while process.poll() is None and not ((out / "log.jsonl").exists() and '"loss"' in (out / "log.jsonl").read_text()):
        time.sleep(0.05)
    process.terminate()
    said = process.communicate()[1]
    found = re.fullmatch(r"lowrank: stopped by SIGTERM after step (\d+); to go on: lowrank (.*)", said.splitlines()[-1])
    assert process.returncode == 143 and "Traceback" not in said and found, said
    step = int(found[1])
    there = {"out", "out/log.jsonl", "out/train.yaml", "out/checkpoints"}
    files = {f"out/checkpoints/step-{step}{file}" for file in ("", "/state.json", "/state.safetensors")}
    assert snapshot(tmp_path).keys() == there | files
    monkeypatch.chdir(home)
    assert cli.main([*COMMANDS["train"].split(), str(out)]) == 2
    assert "a run that is not finished: go on with --resume" in capsys.readouterr().err
    assert cli.main([*found[2].split(), "--steps", str(step + 1)]) == 0
    assert (out / "adapter_config.json").exists() and not (out / "checkpoints").exists()


def test_a_demo_that_was_stopped_does_not_block_the_next(tmp_path: Path) -> None:
    from lowrank.errors import OutputError
    from lowrank.study.demo import telling

    with pytest.raises(KeyboardInterrupt), telling(str(tmp_path / "demo")) as story:
        story.data.mkdir()
        (story.data / "half").touch()
        raise KeyboardInterrupt
    with telling(str(tmp_path / "demo")) as story:
        assert not story.data.exists()
        story.data.mkdir()
    assert snapshot(tmp_path).keys() == {"demo", "demo/data"}
    with pytest.raises(OutputError, match="not empty"), telling(str(tmp_path / "demo")):
        pass


def test_handlers_of_others_stay() -> None:
    """nohup's, and those of a program that calls main()."""
    from lowrank.cli.signals import Ended, unwinding

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwinding():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGHUP):
            with pytest.raises(Ended), unwinding():
                os.kill(os.getpid(), number)
                time.sleep(1)
            assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
