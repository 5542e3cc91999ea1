"""What may happen to a checkpoint: files that are none, disks that refuse, trainings that diverge, time that is up."""

import errno
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank import train
from lowrank.checkpoint import atomic
from lowrank.cli import main
from lowrank.errors import CheckpointError, Diverged, LowrankWarning, Stopped
from lowrank.train.reporting import Progress, Reporter
from lowrank.train.state import keeper
from lowrank.train.state.forward import ForwardState
from lowrank.train.state.settings import seconds_of
from lowrank.train.state.store import latest, steps_kept
from lowrank.train.state.value import RunValue, read
from resumed_runs import kill, made, make_home, settings
from train_models import completion_rows, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def saved(home: Path) -> Path:
    """A checkpoint after four steps."""
    kill(settings(home, home / "saved", dropout=0.1), 5)
    return home / "saved" / "checkpoints" / "step-4"


def test_a_checkpoint_read_and_written_again_is_the_same(saved: Path, tmp_path: Path) -> None:
    read(saved).write(tmp_path / "again")
    for name in ("state.json", "state.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_other_programs_read_the_tensors(saved: Path) -> None:
    from safetensors.torch import load_file

    ours = read(saved).tensors
    theirs = load_file(saved / "state.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    groups = {name.split(".")[0] for name in ours}
    assert groups == {"weights", "optimiser", "random"}
    factors = {name.removeprefix("weights.") for name in ours if name.startswith("weights.")}
    assert {f"optimiser.{key}.{name}" for name in factors for key in ("step", "exp_avg", "exp_avg_sq")} <= ours.keys()


def facts_of(saved: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((saved / "state.json").read_text())
    return found


@pytest.mark.parametrize("where", ["step", "random", "about", "interval", "log", "evaluations", "optimiser"])
def test_what_is_missing_in_a_checkpoint_is_one_sentence(where: str, saved: Path, tmp_path: Path) -> None:
    value = read(saved)
    value.write(tmp_path / "it")
    content = facts_of(saved)
    del content[where]
    (tmp_path / "it" / "state.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"state\.json: {where}: field required: delete this checkpoint"):
        read(tmp_path / "it")


def test_going_on_from_a_checkpoint_that_does_not_fit_changes_nothing(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kill(settings(home, out), 5)
    last = out / "checkpoints" / "step-4"
    value = read(last)
    RunValue({name: t for name, t in value.tensors.items() if name != "random.torch"}, value.facts).write(last)
    before = (out / "train.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=r"step-4: the checkpoint has no random states"):
        train.resume(out, steps=20)
    assert (out / "train.yaml").read_bytes() == before


BAD: list[tuple[str, Any, str]] = [
    ("step", -1, "step: input should be greater"),
    ("step", "4", "step: input should be a valid integer"),
    ("step", True, "step: input should be a valid integer"),
    ("place", [1], "place.1: field required"),
    ("random", [{"python": []}], "random.0.python.0: field required"),
    ("spell", 1, "spell: extra inputs are not permitted"),
    ("format", 2, "has format 2, this version reads up to 1: upgrade lowrank"),
    ("halvings", None, "halvings: input should be a valid integer"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_what_is_wrong_in_a_checkpoint_is_one_sentence(
    name: str, value: Any, message: str, saved: Path, tmp_path: Path
) -> None:
    read(saved).write(tmp_path / "it")
    (tmp_path / "it" / "state.json").write_text(json.dumps(facts_of(saved) | {name: value}))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "it")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff"])
def test_a_file_that_is_none_is_one_sentence(content: bytes | None, saved: Path, tmp_path: Path) -> None:
    read(saved).write(tmp_path / "it")
    (tmp_path / "it" / "state.json").unlink()
    if content is not None:
        (tmp_path / "it" / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.json .*delete this checkpoint"):
        read(tmp_path / "it")


def test_tensors_of_another_model_are_refused(home: Path, tmp_path: Path) -> None:
    """Nobody's own doing: two checkpoints were mixed up."""
    kill(settings(home, tmp_path / "one"), 3)
    kill(settings(home, tmp_path / "other", rank=2), 3)
    name = "checkpoints/step-2/state.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"step-2: .*lora_default\.\w is \(.* in the checkpoint, and here"):
        train.resume(tmp_path / "one")


class At(Reporter):
    """Does something after a step."""

    def __init__(self, step: int, what: Callable[[], object]) -> None:
        self.step, self.what = step, what

    def stepped(self, step: int) -> None:
        if step == self.step:
            self.what()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_a_checkpoint_does_not_end_the_training(
    code: int,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Said; the last whole one stays; the next one is tried again, and the result is what it would have been."""
    train.run(settings(home, tmp_path / "whole"))
    real, broken = atomic._write_synced, [False]

    def write(path: Path, data: Any) -> None:
        if broken[0] and "checkpoints" in path.parts:
            real(path, data[: len(data) // 2])
            raise OSError(code, os.strerror(code), str(path))
        real(path, data)

    class Disk(Reporter):
        def stepped(self, step: int) -> None:
            broken[0] = 3 <= step < 7
            if step == 7:
                assert steps_kept(tmp_path / "run") == [2] and os.listdir(tmp_path / "run/checkpoints") == ["step-2"]
            if step == 9:
                assert steps_kept(tmp_path / "run") == [2, 8]

    monkeypatch.setattr(atomic, "_write_synced", write)
    with pytest.warns(
        LowrankWarning, match=rf"step-4: .*\({os.strerror(code)}\); .* goes on, that of step 2"
    ) as caught:
        train.run(settings(home, tmp_path / "run"), Disk())
    assert len([one for one in caught if "checkpoint cannot" in str(one.message)]) == 1  # of 4 and 6
    assert made(tmp_path / "run") == made(tmp_path / "whole")


@pytest.fixture
def nan(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Reporter]:
    """(step, times) → a reporter; after that step the loss of the next is none, so many times."""
    from lowrank.train.loop import Loop

    real, state = Loop._backward, {"step": 0, "left": 0}

    def backward(loop: Loop, rows: Any, count: int) -> float:
        total = real(loop, rows, count)
        if loop.state.step == state["step"] and state["left"]:
            state["left"] -= 1
            return math.nan
        return total

    monkeypatch.setattr(Loop, "_backward", backward)

    def arm(step: int, times: int) -> Reporter:
        state.update(step=step, left=times)
        return Reporter()

    return arm


def test_a_loss_that_is_no_number_names_rows_and_the_last_checkpoint(
    home: Path,
    tmp_path: Path,
    nan: Callable[[int, int], Reporter],
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Diverged) as caught:
        train.run(settings(home, out), nan(5, 9))
    said = str(caught.value)
    assert said.startswith("step 6: the loss is nan (one of the rows of ") and "\n" not in said
    assert f"{home}/rows.jsonl:" in said and " and 3 more)" in said
    assert f"{out}/checkpoints/step-4 is the last good checkpoint, which lowrank train --resume {out} " in said
    assert steps_kept(out) == [2, 4]


def test_a_row_whose_own_loss_is_no_number_is_named(home: Path, tmp_path: Path) -> None:
    """The embedding of a word that one row has is broken."""
    from train_models import WORDS, save_llama

    rows = completion_rows(20)
    rows[7] = {"prompt": "film", "completion": "the cat"}
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    model = save_llama(tmp_path / "llama")
    from lowrank.train.models import load_causal

    broken = load_causal(model, torch.float32)
    with torch.no_grad():
        broken.get_input_embeddings().weight[WORDS.index("film")] = math.inf  # type: ignore[operator]
    broken.save_pretrained(model)  # type: ignore[operator]
    with pytest.raises(Diverged, match=rf"the loss is nan \(by the row of {data}:8\), so nothing more"):
        train.run(settings(home, tmp_path / "run", model=str(model), data=str(data)))
    rows.insert(2, {"prompt": "what", "completion": "the cat " * 80})  # a row that is left out: places are counted anew
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(Diverged, match=rf"by the row of {data}:9\)"), pytest.warns(LowrankWarning, match="1 of 21"):
        train.run(settings(home, tmp_path / "run", model=str(model), data=str(data)))
    with pytest.raises(Diverged, match=rf"by the rows of {data}:9, "), pytest.warns(LowrankWarning, match="1 of 21"):
        train.run(settings(home, tmp_path / "run", model=str(model), data=str(data), pack=True, batch_size=20))


class Rates(Reporter):
    def __init__(self) -> None:
        self.rates: list[tuple[int, float]] = []

    def progressed(self, progress: Progress) -> None:
        self.rates.append((progress.step, progress.rate))


def test_back_to_the_last_checkpoint_at_half_the_rate(
    home: Path,
    tmp_path: Path,
    nan: Callable[[int, int], Reporter],
) -> None:
    how: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "log_every": 1, "on_divergence": "back"}
    nan(5, 2)
    seen = Rates()
    with pytest.warns(LowrankWarning, match="step 6: the loss is nan.*; back to step 4, at 1/4 of the rate"):
        train.run(settings(home, tmp_path / "run", **how), seen)
    assert [rate for step, rate in seen.rates if step == 5] == [0.01, 0.005, 0.0025]
    assert seen.rates[-1] == (9, 0.0025)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    nan(5, 2)
    with pytest.warns(LowrankWarning, match="1/4 of the rate"):
        kill(settings(home, tmp_path / "killed", **how), 8)
    train.resume(tmp_path / "killed")
    assert made(tmp_path / "killed") == made(tmp_path / "run")


def test_back_three_times_at_most(home: Path, tmp_path: Path, nan: Callable[[int, int], Reporter]) -> None:
    nan(0, 9)
    with pytest.raises(Diverged, match="gone back to 3 times in vain"), pytest.warns(LowrankWarning) as caught:
        train.run(settings(home, tmp_path / "run", on_divergence="back"))
    assert [f"1/{2**n} of the rate" in str(one.message) for n, one in enumerate(caught, 1)] == [True] * 3
    assert steps_kept(tmp_path / "run") == [0]


def test_spans_of_time() -> None:
    assert [seconds_of(text) for text in ("3h55m", "45m", "1d12h", "90s", " 2H ")] == [14100, 2700, 129600, 90, 7200]
    assert [seconds_of(text) for text in ("", "3", "h", "5m3h", "1.5h", "-1h", "0s")] == [0] * 7


def test_time_that_is_up_stops_with_a_checkpoint(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train.run(settings(home, tmp_path / "whole"))
    out = tmp_path / "a run"
    clock = [time.monotonic()]
    monkeypatch.setattr("lowrank.train.state.stopping.time.monotonic", lambda: clock[0])
    with pytest.raises(
        Stopped, match=r"stopped by --stop-after 2h after step 3; to go on: .*--resume '.*a run'"
    ) as stop:
        train.run(settings(home, out, stop_after="2h"), At(3, lambda: clock.__setitem__(0, clock[0] + 7201)))
    assert stop.value.number is None and steps_kept(out)[-1] == 3
    monkeypatch.setattr("lowrank.train.state.stopping.Stop.wanted", True)
    assert main(["train", "--resume", str(out)]) == 75
    assert "lowrank: stopped by --stop-after 2h after step 4" in capsys.readouterr().err  # a step at least
    monkeypatch.undo()
    train.resume(out, stop_after=None)
    assert made(out)["adapter_model.safetensors"] == made(tmp_path / "whole")["adapter_model.safetensors"]


@pytest.fixture
def _signals_are_heard() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so do we where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_writes(number: signal.Signals, home: Path, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=rf"^stopped by {number.name} after step 3; to go on: ") as stop:
        train.run(settings(home, tmp_path / "run"), At(3, lambda: signal.raise_signal(number)))
    assert (stop.value.number, steps_kept(tmp_path / "run")) == (number, [2, 3])
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("_signals_are_heard")
def test_a_second_signal_stops_at_once(home: Path, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        train.run(settings(home, tmp_path / "run"), At(3, twice))
    assert type(caught.value) is KeyboardInterrupt
    assert steps_kept(tmp_path / "run") == [2]


@pytest.mark.usefixtures("_signals_are_heard")
def test_a_signal_leaves_an_evaluation_which_is_made_up_for(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lowrank.train import loop

    how = {"eval_data": str(home / "unseen.jsonl"), "eval_every": 9, "dropout": 0.1}
    train.run(settings(home, tmp_path / "whole", **how))
    real = loop.score

    def score(*arguments: Any) -> Any:
        if steps_kept(tmp_path / "run"):
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "score", score)
        with pytest.raises(Stopped, match="after step 9"):
            train.run(settings(home, tmp_path / "run", **how))
    train.resume(tmp_path / "run")
    assert made(tmp_path / "run") == made(tmp_path / "whole")


def test_a_training_in_a_thread_hears_no_signals(home: Path, tmp_path: Path) -> None:
    worker = threading.Thread(target=train.run, args=[settings(home, tmp_path / "run")])
    worker.start()
    worker.join()
    assert (tmp_path / "run" / "run.json").exists()


def test_ten_minutes_where_nothing_is_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(settings(home, tmp_path / "run", save_every=None), 5)
    assert steps_kept(tmp_path / "run") == []
    monkeypatch.setattr(keeper, "SECONDS", 0.0)
    kill(settings(home, tmp_path / "run", save_every=None), 5)
    assert steps_kept(tmp_path / "run") == [3, 4]
    value = latest(tmp_path / "run")
    assert value is not None and value.facts.place == (1, 0)  # 21 rows are four batches of six


class Changing(nn.Module):
    """Forward passes change it: statistics, a buffer that is replaced, a number. Dynamic rotary embeddings do too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.ones(2), persistent=False)
        self.register_buffer("still", torch.ones(2))
        self.longest, self.other = 4, 1.5

    def forward(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, len(x))
        self.register_buffer("table", torch.full((2,), float(self.longest)), persistent=False)
        return self.norm(x)


def test_what_forward_passes_change_of_a_model_belongs_to_a_run() -> None:
    model = Changing()
    watched = ForwardState(model)
    assert (watched.buffers(), watched.numbers()) == ({}, {})
    model(torch.randn(7, 3))
    buffers, numbers = watched.buffers(), watched.numbers()
    assert buffers.keys() == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "table"}
    assert numbers == {":longest": 7}
    fresh = Changing()
    again = ForwardState(fresh)
    again.restore(buffers, numbers)
    assert all(torch.equal(one, two) for one, two in zip(fresh.buffers(), model.buffers(), strict=True))
    assert (again.buffers().keys(), again.numbers()) == (buffers.keys(), numbers)
    for what, message in ((({"no": torch.ones(1)}, {}), "no buffer 'no'"), (({}, {":longest": 1.5}), "no number")):
        with pytest.raises(CheckpointError, match=message):
            again.restore(*what)  # type: ignore[arg-type]
