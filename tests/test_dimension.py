"""`lowrank dimension`: the subspace's laws, d90, resuming, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.checkpoint.outputs import claimed
from lowrank.cli import main
from lowrank.core.fastfood import Fastfood
from lowrank.errors import ConfigError, Diverged, OutputError
from lowrank.study.dimension import Crossing, DimensionSettings, crossing, ladder, measure_dimension
from lowrank.study.dimension.subspace import Subspace
from lowrank.study.dimension.training import Point, Task
from train_models import completion_rows, label_rows, save_bert, save_llama, write_jsonl


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize("scaled", [False, True])
def test_at_the_start_it_is_the_model_itself(scaled: bool) -> None:
    model, x = small(), torch.randn(4, 5)
    expected = model(x)
    space = Subspace(model, dict(model.named_parameters()), 9, 0, scaled)
    assert torch.equal(space(x), expected)
    with torch.no_grad():
        assert torch.equal(space(x), expected)


@pytest.mark.parametrize("scaled", [False, True])
def test_it_moves_by_the_projection_and_leaves_the_model_alone(scaled: bool) -> None:
    model, x = small(), torch.randn(4, 5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    space = Subspace(model, list(start), 9, 3, scaled)
    total = sum(p.numel() for p in start.values())
    with torch.no_grad():
        space.z.normal_()
        if space.scales is not None:
            space.scales.copy_(torch.tensor([2.0, -0.5]))
        moved = space(x)
    flat = Fastfood(9 - 2 * scaled, total, 3).times(space.z.detach()).split([p.numel() for p in start.values()])
    by = {"0": 2.0, "2": -0.5} if scaled else {"0": 1.0, "2": 1.0}
    expected = small()
    with torch.no_grad():
        for (name, p), move in zip(expected.named_parameters(), flat, strict=True):
            p.copy_(start[name] + by[name[0]] * move.view(p.shape))
        assert torch.allclose(moved, expected(x), atol=1e-6)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_the_gradient_is_the_full_one_projected_back() -> None:
    model, x = small(), torch.randn(4, 5)
    names = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x).square().sum(), list(names.values()))
    space = Subspace(model, names, 6, 1)
    space(x).square().sum().backward()  # type: ignore[no-untyped-call]
    full = torch.cat([grad.flatten() for grad in grads])
    assert space.z.grad is not None
    assert torch.allclose(space.z.grad, Fastfood(6, len(full), 1).transposed_times(full), rtol=1e-4, atol=1e-5)


def test_only_the_subspace_is_trained() -> None:
    space = Subspace(small(), ["0.weight"], 4, 0)
    assert {name for name, _ in space.named_parameters()} == {"z"}


@pytest.mark.parametrize(("d", "scaled"), [(2, True), (67, False)])
def test_dimensions_that_cannot_be_are_refused(d: int, scaled: bool) -> None:
    model = small()
    with pytest.raises(ConfigError, match=f"d = {d}, but it must be"):
        Subspace(model, dict(model.named_parameters()), d, 0, scaled)


def test_the_crossing_lies_between_two_steps_of_the_ladder() -> None:
    curve = {4: 0.0, 16: 1.0, 64: 0.5}
    assert crossing(curve, 0.5) == Crossing(0.5, 8.0)
    assert crossing(curve, 1.0) == Crossing(1.0, 16.0)
    assert crossing(curve, -1.0) == Crossing(-1.0, 4.0, at_most=True)
    assert crossing(curve, 1.1) == Crossing(1.1, None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dimension")
    data = write_jsonl(folder / "rows.jsonl", completion_rows(60))
    return {"model": str(save_llama(folder / "llama")), "data": str(data), "steps": 12, "batch_size": 8, "lr": 3e-3}


def settings(common: dict[str, Any], out: Path, **more: Any) -> DimensionSettings:
    return DimensionSettings.model_validate({**common, "ladder": (4, 64), "seeds": 2, "out": str(out), **more})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resumed_is_never_stopped_and_finished_points_are_not_run_again(llama: dict[str, Any], tmp_path: Path) -> None:
    measured = measure_dimension(settings(llama, tmp_path / "whole"))
    assert [p.name for p in measured.points] == ["full", "frozen", "4", "64"] * 2
    assert measured.points[0].score > measured.points[1].score
    assert measured.points[1].trained == 0 and measured.points[2].trained == 4
    run: list[str] = []
    measure_dimension(settings(llama, tmp_path / "cut", seeds=1, ladder=(4,)))
    measure_dimension(
        settings(llama, tmp_path / "cut"), lambda name, point: run.append(name) if point is None else None
    )
    assert run == ["64, seed 0", "full, seed 1", "frozen, seed 1", "4, seed 1", "64, seed 1"]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_full_subspace_learns_about_as_full_fine_tuning_does(llama: dict[str, Any], tmp_path: Path) -> None:
    wide = {**llama, "steps": 60}
    measured = measure_dimension(settings(wide, tmp_path / "d", ladder=(2, 8192), seeds=1))
    full, frozen, narrow, broad = (point.score for point in measured.points)
    assert frozen < full
    assert (broad - frozen) > 3 * abs(narrow - frozen)
    assert (broad - frozen) > 0.5 * (full - frozen)


@pytest.mark.parametrize("method", ["direct", "said"])
def test_a_classifier_moves_its_targets_and_its_head(method: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", label_rows(60))
    common = {"model": str(save_bert(tmp_path / "bert")), "data": str(data), "steps": 3, "method": method}
    measured = measure_dimension(settings(common, tmp_path / "out", over="targets", ladder=(16,), seeds=1))
    full, frozen, _ = measured.points
    assert measured.metric == "accuracy"
    assert 0 < frozen.trained < full.trained == measured.weights


def test_of_several_rates_the_best_counts(llama: dict[str, Any], tmp_path: Path) -> None:
    one, other, both = (
        measure_dimension(settings(llama, tmp_path / name, ladder=(64,), seeds=1, rates=rates)).points
        for name, rates in [("one", (1.0,)), ("other", "0.01"), ("both", "0.01,1")]
    )
    assert [max(pair, key=lambda point: point.score) for pair in zip(one, other, strict=True)] == list(both)
    assert one[0].lr == pytest.approx(100 * other[0].lr)
    assert both[0].score > other[0].score


def test_a_rate_that_diverges_is_lost_and_the_others_count(llama: dict[str, Any], tmp_path: Path) -> None:
    one, two = (
        measure_dimension(settings(llama, tmp_path / name, ladder=(64,), seeds=1, rates=rates)).points
        for name, rates in [("one", "1"), ("two", "1,1e25")]
    )
    assert one == two


def test_where_every_rate_diverges_the_run_ends_with_the_points_it_has(
    llama: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call({**llama, "seeds": 1}, tmp_path / "out", "--rates", "1e25,1e26") == 2
    error = capsys.readouterr().err
    assert "full, seed 0: step" in error and "--rates" in error and error.count("\n") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dimension-settings.json"}


def test_a_point_that_diverges_is_left_out_and_the_others_count(
    llama: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Task.point

    def point(task: Task, name: str, seed: int, reporter: Any = None) -> Point:
        if name == "4":
            raise Diverged("4, seed 0: step 3 has a loss of nan")
        return real(task, name, seed, reporter)

    monkeypatch.setattr(Task, "point", point)
    assert call(llama, tmp_path / "out", "--ladder", "4,64", "--seeds", "1") == 0
    told = capsys.readouterr()
    assert "left out of the curve" in told.err and told.err.count("warning") == 1
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"point-64-seed0.json", "dimension.json", "dimension.html"} <= held and "point-4-seed0.json" not in held
    with pytest.raises(Diverged, match="no point"):
        measure_dimension(settings(llama, tmp_path / "none", ladder=(4,), seeds=1))


def test_the_figure_is_written_while_the_folder_is_claimed(llama: dict[str, Any], tmp_path: Path) -> None:
    def finish(_measured: Any, folder: Path) -> None:
        with pytest.raises(OutputError, match="writ"), claimed(folder, {}, lambda _place: None):
            pass
        told.append(folder)

    told: list[Path] = []
    measure_dimension(settings(llama, tmp_path / "out", seeds=1), finish=finish)
    assert told == [tmp_path / "out"]


def test_a_full_disk_loses_no_finished_point(
    llama: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ladder.write_file

    def full(path: Path, data: bytes) -> None:
        if path.name == "point-4-seed0.json":
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(ladder, "write_file", full)
    assert call(llama, tmp_path / "out", "--ladder", "4,64", "--seeds", "1") == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(files(tmp_path / "out")) == [
        "dimension-settings.json",
        "point-frozen-seed0.json",
        "point-full-seed0.json",
    ]
    monkeypatch.undo()
    measure_dimension(settings(llama, tmp_path / "out", seeds=1))
    measure_dimension(settings(llama, tmp_path / "whole", seeds=1))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_d90_is_read_at_nine_tenths_of_the_gain_and_of_the_accuracy(llama: dict[str, Any], tmp_path: Path) -> None:
    def scored(name: str, score: float) -> Point:
        return Point(name, 0, 1, 1e-3, 0.0, score, score)

    points = [scored("full", 1.0), scored("frozen", 0.5), scored("4", 0.85), scored("64", 1.0)]
    asked = settings(llama, tmp_path, seeds=1)
    found = ladder.summarised(asked, 100, "accuracy", points)
    assert found.of_gain == (crossing({4: 0.85, 64: 1.0}, 0.95),)  # 0.5 + 0.9·(1 − 0.5)
    assert found.of_score == (crossing({4: 0.85, 64: 1.0}, 0.9),)
    assert ladder.summarised(asked, 100, "loss", points).of_score == (None,)
    level = [scored("full", 0.5), scored("frozen", 0.5), *points[2:]]
    assert ladder.summarised(asked, 100, "accuracy", level).of_gain == (None,)


def test_scales_of_the_modules_reach_what_one_subspace_cannot() -> None:
    """θ0 + λ·P·z with another λ for each module is not in the range of P; SAID finds it and the direct form cannot."""
    model = small()
    names = list(dict(model.named_parameters()))
    truth = Subspace(model, names, 6, 5, scaled=True)
    with torch.no_grad():
        truth.z.copy_(torch.tensor([1.0, -2.0, 1.5, 0.5]))
        assert truth.scales is not None
        truth.scales.copy_(torch.tensor([3.0, -1.0]))
        wanted = {name: value.clone() for name, value in truth.weights().items()}

    def left(scaled: bool) -> float:
        space = Subspace(model, names, 6 if scaled else 4, 5, scaled)
        optimiser = torch.optim.Adam(space.parameters(), lr=0.05)
        for _ in range(400):
            optimiser.zero_grad()
            moved = space.weights()
            loss = sum(((moved[name] - wanted[name]).square().sum() for name in names), torch.zeros(()))
            torch.autograd.backward(loss)
            optimiser.step()
        return float(loss.detach())

    assert left(True) < 1e-3 < 1.0 < left(False)


def call(common: dict[str, Any], out: Path, *more: str) -> int:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]
    return main(["dimension", *flags, "--out", str(out), *more])


def test_the_command_writes_numbers_words_and_a_figure(
    llama: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(llama, tmp_path / "out", "--ladder", "4,64", "--seeds", "1") == 0
    assert "90 % of the gain" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "dimension.json").read_text())["metric"] == "loss"
    page = (tmp_path / "out" / "dimension.html").read_text()
    assert "<svg" in page and "http" not in page


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--ladder", "64,4"], "ladder must be rising"),
        (["--ladder", "4,lots"], "--ladder"),
        (["--ladder", "99999999"], "d = 99999999, but it must be at least 1 and at most"),
        (["--eval-split", "0.01"], "are too few"),
        (["--rates", "0,1"], "rates must be positive"),
        (["--targets", "q_proj"], "targets needs --over targets"),
        (["--over", "targets", "--targets", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    llama: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert call(llama, tmp_path / "out", "--seeds", "1", *more) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_points_of_other_settings_are_not_mixed(
    llama: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_dimension(settings(llama, tmp_path / "out", ladder=(4,), seeds=1))
    before = files(tmp_path / "out")
    assert call({**llama, "lr": 1e-3}, tmp_path / "out") == 2
    assert "--lr (0.003 then)" in capsys.readouterr().err
    assert files(tmp_path / "out") == before


def test_where_full_fine_tuning_gains_nothing_there_is_no_d90(
    llama: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call({**llama, "lr": 3.0, "steps": 4}, tmp_path / "out", "--ladder", "4", "--seeds", "1") == 0
    assert "there is no d90" in capsys.readouterr().out
