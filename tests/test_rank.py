"""`lowrank rank`: the sketch, the allotment, the ranks from a gradient and from an adapter, and what is refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lowrank
from checkpoint_models import IDS, Convolutions, convolutions, disturb, gpt2, llama
from lowrank import LoraConfig
from lowrank.adapters.proposal import ModuleSpectrum, adapter_spectra, propose
from lowrank.cli import main
from lowrank.core.allotment import allot
from lowrank.core.sketch import Directions, Sketch
from lowrank.errors import ConfigError
from lowrank.injection.planning import plan
from lowrank.study.rank import AdapterRankSettings, GradientRankSettings, from_adapter, from_gradient
from lowrank.study.rank.gradients import empty_sketches, watched
from train_models import completion_rows, label_rows, save_bert, save_llama, write_jsonl

CPU = torch.device("cpu")


def matrix(d: int, k: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(d, len(sigma), generator=generator)).Q
    v = torch.linalg.qr(torch.randn(k, len(sigma), generator=generator)).Q
    return u * sigma @ v.t()


def sketched(terms: list[Tensor], rank: int, seed: int = 0) -> Any:
    sketch = Sketch(*terms[0].shape, Directions(rank, seed, CPU))
    for term in terms:
        sketch.add(term)
    return sketch


class TestSketch:
    def test_a_small_matrix_is_measured_exactly(self) -> None:
        whole = torch.randn(20, 30)
        found = sketched([whole * 0.25, whole * 0.75], 8).spectrum()
        assert found.exact
        torch.testing.assert_close(found.sigma, torch.linalg.svdvals(whole.double())[:8], rtol=1e-5, atol=1e-5)
        assert found.total == pytest.approx(float(whole.square().sum()), rel=1e-5)

    @pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
    def test_a_matrix_of_low_rank_is_found_again_up_to_rounding(self, shape: tuple[int, int]) -> None:
        sigma = torch.linspace(3, 1, 8)
        found = sketched([matrix(*shape, sigma)], 8).spectrum()
        assert not found.exact
        torch.testing.assert_close(found.sigma, sigma.double(), rtol=1e-4, atol=1e-4)
        assert found.total == pytest.approx(float(sigma.square().sum()), rel=1e-4)

    def test_the_sum_is_sketched_and_not_its_terms(self) -> None:
        """Two terms that cancel but for a little, as gradients of batches do."""
        big, little = matrix(300, 200, torch.full((5,), 10.0), 1), matrix(300, 200, torch.tensor([1.0]), 2)
        found = sketched([big, little - big], 4).spectrum()
        assert float(found.sigma[0]) == pytest.approx(1.0, rel=1e-3)
        assert float(found.sigma[1]) < 1e-3

    @pytest.mark.parametrize(("power", "below"), [(0.5, 0.2), (1.0, 0.05), (1.5, 0.005)])
    def test_the_energy_of_a_long_tail_is_estimated_without_flattering(self, power: float, below: float) -> None:
        """The whole energy without bias; the share that the first R directions hold, at most as it is."""
        sigma = torch.arange(1, 301).float() ** -power
        whole, exact = matrix(400, 300, sigma), float(sigma.square().sum())
        share = float(sigma[:10].square().sum()) / exact
        spectra = [sketched([whole], 10, seed).spectrum() for seed in range(8)]
        assert not any(found.exact for found in spectra)
        assert sum(found.total for found in spectra) / 8 == pytest.approx(exact, rel=0.05)
        shares = [float(found.sigma.square().sum()) / found.total for found in spectra]
        assert share - below < sum(shares) / 8 < share + 0.01

    def test_no_whole_gradient_is_kept_of_a_large_matrix(self) -> None:
        sketch = Sketch(4096, 2048, Directions(8, 0, CPU))
        kept = sum(t.numel() for t in (sketch.range, sketch.other) if t is not None)
        assert sketch.whole is None and kept < 4096 * 2048 / 20

    def test_zero_has_a_spectrum_of_zeros(self) -> None:
        for shape in ((4, 5), (300, 200)):
            found = sketched([torch.zeros(shape)], 3).spectrum()
            assert found.total == 0 and not found.sigma.any()


def held(gains: list[list[float]], ranks: tuple[int, ...]) -> float:
    return sum(sum(gain[:rank]) for gain, rank in zip(gains, ranks, strict=True))


FALLING = st.lists(st.floats(0, 10), min_size=1, max_size=3).map(lambda gains: sorted(gains, reverse=True))
SPECTRA = st.lists(FALLING, min_size=1, max_size=4)


class TestAllotment:
    @given(SPECTRA, st.integers(0, 12), st.integers(1, 5))
    def test_with_equal_costs_nothing_holds_more(self, gains: list[list[float]], spare: int, cost: int) -> None:
        budget = cost * len(gains) + spare
        ranks = allot(gains, [cost] * len(gains), budget)
        choices = itertools.product(*(range(1, len(gain) + 1) for gain in gains))
        best = max(held(gains, ranks) for ranks in choices if sum(ranks) * cost <= budget)
        assert sum(ranks) * cost <= budget
        assert held(gains, tuple(ranks)) == pytest.approx(best)

    @given(SPECTRA, st.lists(st.integers(1, 7), min_size=4, max_size=4), st.integers(0, 30))
    def test_with_other_costs_the_best_is_less_than_one_rank_away(
        self, gains: list[list[float]], costs: list[int], spare: int
    ) -> None:
        costs = costs[: len(gains)]
        budget = sum(costs) + spare
        ranks = allot(gains, costs, budget)
        assert sum(n * c for n, c in zip(ranks, costs, strict=True)) <= budget
        choices = itertools.product(*(range(1, len(gain) + 1) for gain in gains))
        best = max(held(gains, r) for r in choices if sum(n * c for n, c in zip(r, costs, strict=True)) <= budget)
        assert held(gains, tuple(ranks)) >= best - max(map(max, gains)) - 1e-9

    def test_the_budget_goes_where_a_rank_adds_most_for_its_cost(self) -> None:
        assert allot([[5, 4, 3], [5, 1, 0]], [1, 1], 4) == [3, 1]
        assert allot([[5, 4], [5, 4]], [10, 1], 13) == [1, 2]

    def test_a_direction_without_energy_is_not_bought(self) -> None:
        assert allot([[5, 0, 0], [1, 1]], [1, 1], 100) == [1, 2]

    def test_a_budget_below_the_least_ranks_is_refused(self) -> None:
        with pytest.raises(ValueError, match="20 numbers are needed"):
            allot([[1.0], [1.0]], [10, 10], 19)


def spectrum(path: str, squares: list[float], cost: int = 10, given: int = 0) -> ModuleSpectrum:
    return ModuleSpectrum(path, (5, 5), cost, tuple(squares), sum(squares), 2.0, given)


class TestProposal:
    def test_without_a_budget_every_module_gets_the_rank_that_holds_the_share(self) -> None:
        found = propose([spectrum("a", [9, 1]), spectrum("b", [5, 4, 1])], energy=0.9)
        assert found.ranks == (1, 2)
        assert found.held == pytest.approx(18 / 20)

    def test_a_uniform_rank_is_a_budget_and_is_never_beaten_by_itself(self) -> None:
        modules = [spectrum("a", [4, 3, 2, 1]), spectrum("b", [9, 0.1, 0.1, 0.1])]
        found = propose(modules, rank=2)
        assert found.parameters <= 40 and found.uniform == 2
        assert found.ranks == (3, 1) and found.held > found.held_uniform

    def test_the_scale_stays_whatever_the_rank(self) -> None:
        found = propose([spectrum("m.a", [4, 3, 2, 1]), spectrum("m.b", [9, 0.1])], rank=2).config()
        assert (found.r, found.lora_alpha) == (3, 6)
        assert found.rank_pattern == {"m.b": 1} and found.alpha_pattern == {"m.b": 2}

    def test_zeros_and_a_budget_too_small_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="every matrix is zero"):
            propose([spectrum("a", [0.0, 0.0])])
        with pytest.raises(ConfigError, match=r"--budget 19 is too small: rank 1 of these 2 modules takes 20"):
            propose([spectrum("a", [1.0]), spectrum("b", [1.0])], budget=19)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (llama, {"target_modules": "all-linear"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": (gpt2, {"target_modules": ["c_fc"]}),
    "parts": (gpt2, {"target_modules": ["c_attn[q,v]"]}),
    "conv": (convolutions, {"target_modules": ["one", "two", "three"]}),
}


def loss(model: nn.Module) -> Tensor:
    if isinstance(model, Convolutions):
        return model(torch.linspace(-2, 2, 128).sin().view(2, 4, 16)).square().sum()
    return model(IDS).logits.square().sum()


@pytest.mark.parametrize("case", KINDS)
def test_every_target_is_given_its_own_gradient_and_the_model_is_left_as_it_was(case: str) -> None:
    build, config = KINDS[case]
    model: nn.Module = build()
    planned = plan(model, LoraConfig(r=2, **config))
    parameters = dict(model.named_parameters())
    exact = dict(zip(parameters, torch.autograd.grad(loss(model), list(parameters.values())), strict=True))
    flags = [i % 2 == 0 for i in range(len(parameters))]
    for parameter, flag in zip(parameters.values(), flags, strict=True):
        parameter.requires_grad_(flag)
    directions = Directions(4, 0, CPU)
    sketches = {entry.path: empty_sketches(entry, directions) for entry in planned.entries}
    with watched(model, planned.entries, sketches):
        for _ in range(2):
            torch.autograd.backward(loss(model) / 2)
    for entry in planned.entries:
        whole = entry.kind.matrix(exact[f"{entry.path}.weight"])
        for part, sketch in zip(entry.parts or (None,), sketches[entry.path], strict=True):
            rows = whole if part is None else whole[part.indices()]
            assert rows.shape == (entry.rows[0], entry.k)
            torch.testing.assert_close(sketch.whole, rows, rtol=1e-4, atol=1e-5 * float(whole.norm()))
    assert [parameter.requires_grad for parameter in parameters.values()] == flags
    assert all(parameter.grad is None for parameter in parameters.values())


def test_tied_weights_have_one_gradient_for_both_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    entries = plan(model, LoraConfig(r=2, target_modules=["0", "1"])).entries
    sketches = {entry.path: [Sketch(4, 4, Directions(2, 0, CPU))] for entry in entries}
    x = torch.randn(3, 4)
    (exact,) = torch.autograd.grad(model(x).square().sum(), [model[0].weight])
    with watched(model, entries, sketches):
        torch.autograd.backward(model(x).square().sum())
    for (sketch,) in sketches.values():
        torch.testing.assert_close(sketch.whole, exact)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rank")
    save_llama(folder / "llama")
    save_bert(folder / "bert")
    write_jsonl(folder / "skill.jsonl", completion_rows(40))
    write_jsonl(folder / "labels.jsonl", label_rows(40))
    return folder


def asked(home: Path, **changes: Any) -> GradientRankSettings:
    usual = {"model": str(home / "llama"), "data": str(home / "skill.jsonl"), "device": "cpu", "most": 16}
    return GradientRankSettings(**{**usual, **changes})


def test_the_gradient_does_not_depend_on_how_the_rows_are_cut(home: Path) -> None:
    one, other = (from_gradient(asked(home, sample=20, batch_size=size)).proposal for size in (20, 3))
    for ours, theirs in zip(one.modules, other.modules, strict=True):
        assert ours.squares == pytest.approx(theirs.squares, rel=1e-3, abs=1e-6 * ours.total)


def test_what_is_proposed_can_be_trained_and_costs_no_more(home: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(home / "llama"), "--data", str(home / "skill.jsonl"), "--device", "cpu"]
    ranks = tmp_path / "ranks.yaml"
    assert main(["rank", *arguments, "--targets", "all-linear", "--rank", "3", "--out", str(ranks)]) == 0
    run = ["train", "--config", str(ranks), *arguments, "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(run) == 0
    spectra = adapter_spectra(tmp_path / "run")
    wanted = from_gradient(asked(home, targets="all-linear", rank=3, most=64)).proposal
    assert {module.path: module.given for module in spectra} == dict(
        zip((module.path for module in wanted.modules), wanted.ranks, strict=True)
    )
    assert len(set(wanted.ranks)) > 1
    uniform = sum(3 * module.cost for module in wanted.modules)
    assert wanted.parameters == sum(module.given * module.cost for module in spectra) <= uniform
    assert {module.scale for module in spectra} == {2.0}
    assert wanted.held >= wanted.held_uniform


def test_a_new_head_is_told_of_and_the_words_say_heuristic(home: Path, capsys: Any) -> None:
    assert main(["rank", "--model", str(home / "bert"), "--data", str(home / "labels.jsonl"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "head is new" in said and "heuristic" in said and "uniform rank" in said


def save(folder: Path, **config: Any) -> Path:
    model = llama()
    lowrank.inject(model, LoraConfig(r=5, lora_alpha=8, target_modules=["q_proj", "down_proj"], **config))
    disturb(model)
    lowrank.save_adapter(model, folder)
    return folder


def test_an_adapters_ranks_hold_the_energy_that_was_asked_for(tmp_path: Path) -> None:
    choice = from_adapter(AdapterRankSettings(adapter=str(save(tmp_path / "in")), energy=0.8))
    model = llama()
    lowrank.load_adapter(model, tmp_path / "in")
    changed = lowrank.merge_and_unload(model).state_dict()
    base = llama().state_dict()
    for module, rank in zip(choice.proposal.modules, choice.proposal.ranks, strict=True):
        delta = (changed[f"{module.path}.weight"] - base[f"{module.path}.weight"]).double()
        kept = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
        assert kept[rank - 1] >= 0.8 - 1e-4
        assert rank == 1 or kept[rank - 2] < 0.8 + 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_resized_to_its_ranks_and_keeps_its_scales(tmp_path: Path, rslora: bool) -> None:
    folder = save(tmp_path / "in", use_rslora=rslora, rank_pattern={"layers.1.*q_proj": 3})
    budget = 2 * sum(module.cost for module in adapter_spectra(folder))
    ranks = tmp_path / "ranks.yaml"
    assert main(["rank", "--adapter", str(folder), "--budget", str(budget), "--out", str(ranks)]) == 0
    assert main(["resize", "--adapter", str(folder), "--ranks", str(ranks), "--out", str(tmp_path / "out")]) == 0
    before, after = adapter_spectra(folder), adapter_spectra(tmp_path / "out")
    wanted = propose(before, budget=budget)
    assert tuple(module.given for module in after) == wanted.ranks
    assert len(set(wanted.ranks)) > 1 and wanted.parameters <= budget
    for old, new in zip(before, after, strict=True):
        assert new.scale == pytest.approx(old.scale)
        assert new.squares[: new.given] == pytest.approx(old.squares[: new.given], rel=1e-4)


def test_ranks_by_pattern_leave_other_modules_alone(tmp_path: Path) -> None:
    lowrank.resize_adapter(save(tmp_path / "in"), tmp_path / "out", ranks={"layers.0.*down_proj": 2})
    found = {module.path: module.given for module in adapter_spectra(tmp_path / "out")}
    assert found.pop("model.layers.0.mlp.down_proj") == 2
    assert set(found.values()) == {5}


REFUSED = {
    "neither": ([], "--model is needed"),
    "no data": (["--model", "MODEL"], "--data is needed"),
    "budget and rank": (["--model", "MODEL", "--data", "DATA", "--budget", "9", "--rank", "2"], "cannot both be given"),
    "too small": (["--model", "MODEL", "--data", "DATA", "--budget", "9"], "--budget 9 is too small"),
    "energy": (["--model", "MODEL", "--data", "DATA", "--energy", "1.5"], "--energy"),
    "adapter and model": (["--adapter", "ADAPTER", "--model", "MODEL"], "so --model cannot be meant with it"),
    "adapter and sample": (["--adapter", "ADAPTER", "--sample", "3"], "so --sample cannot be meant with it"),
    "no adapter": (["--adapter", "nowhere"], "nowhere"),
    "target": (["--model", "MODEL", "--data", "DATA", "--targets", "q_prj"], "'q_prj' matches no module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(case: str, home: Path, tmp_path: Path, capsys: Any) -> None:
    arguments, words = REFUSED[case]
    names = {"MODEL": str(home / "llama"), "DATA": str(home / "skill.jsonl"), "ADAPTER": str(save(tmp_path / "in"))}
    out = tmp_path / "ranks.yaml"
    assert main(["rank", *(names.get(a, a) for a in arguments), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not out.exists()


def test_ranks_files_that_cannot_be_meant_are_refused(tmp_path: Path, capsys: Any) -> None:
    folder, file = str(save(tmp_path / "in")), tmp_path / "ranks.yaml"
    for text, flags, words in (
        ("targets: q_proj\n", [], "neither rank nor rank_pattern"),
        ("rank: 0\n", [], "rank must be a whole number"),
        ("rank_pattern: {nothing: 3}\n", [], "'nothing' matches no target"),
        ("rank: 2\n", ["--rank", "3"], "--ranks says every module's rank"),
    ):
        file.write_text(text)
        resized = ["resize", "--adapter", folder, "--ranks", str(file), *flags, "--out", str(tmp_path / "out")]
        assert main(resized) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_is_refused_by_name(home: Path, tmp_path: Path, capsys: Any) -> None:
    broken = save_llama(tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    file = broken / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["rank", "--model", str(broken), "--data", str(home / "skill.jsonl"), "--device", "cpu"]) == 2
    assert "the gradient is not finite" in capsys.readouterr().err


def test_json_has_every_number(tmp_path: Path, capsys: Any) -> None:
    assert main(["rank", "--adapter", str(save(tmp_path / "in")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modules"][0]["rank"] >= 1 and len(found["modules"][0]["squares"]) == 5
    assert 0.9 <= found["held"] <= 1
