"""What is measured from an adapter's files, against the dense ΔW of the merged model."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import checkpoint_models as models
import lowrank
from lowrank import LoraConfig
from lowrank.analysis import inspect_adapter
from lowrank.analysis.inspection import Inspection, Layer
from lowrank.core.intruders import LEADING, THRESHOLD
from lowrank.injection.adapters import lora_layers
from merge_disk_models import save_adapter, save_base

R, ALPHA = 3, 5

CASES = {
    "llama": (models.llama, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}),
    "llama rslora": (models.llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "llama embedding": (models.llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "llama pissa": (models.llama, {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}),
    "llama olora": (models.llama, {"target_modules": ["q_proj"], "init_lora_weights": "olora"}),
    "gpt2": (models.gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 parts": (models.gpt2, {"target_modules": ["c_attn[q,v]"]}),
    "bert": (models.bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "t5": (models.t5, {"target_modules": ["q", "v", "wo"]}),
    "vit": (models.vit, {"target_modules": ["q_proj", "projection"]}),
    "convolutions": (models.convolutions, {"target_modules": ["one", "two", "three"]}),
}


def prepare(tmp_path: Path, case: str) -> tuple[nn.Module, Path, Path]:
    """(the plain base, its files, an adapter's files)."""
    make, config = CASES[case]
    model = make().double()
    base = save_base(model, tmp_path / "base", torch.float64)
    return model, base, save_adapter(model, tmp_path / "adapter", r=R, lora_alpha=ALPHA, **config)


def dense_changes(model: nn.Module, adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{path: (W0, ΔW) as (d, k)} from the merged weights of the model itself."""
    lowrank.load_adapter(model, adapter)
    found = {}
    for path, layer in lora_layers(model):
        base = layer.matrix(layer.weight.detach())
        merged = layer.matrix(layer.merged_weight(("default",)))
        found[path] = base, merged - base
    lowrank.unload(model)
    return found


def check_change(layer: Layer, delta: Tensor) -> None:
    sigma = torch.linalg.svdvals(delta)[: len(layer.measure.sigma)]
    torch.testing.assert_close(torch.tensor(layer.measure.sigma, dtype=torch.float64), sigma, rtol=1e-6, atol=1e-9)
    assert layer.measure.shape == tuple(delta.shape)
    assert layer.measure.norm == pytest.approx(float(delta.norm()), rel=1e-7)
    for share, rank in layer.measure.rank_for.items():
        squares = torch.linalg.svdvals(delta).square()
        assert squares[:rank].sum() >= share * squares.sum() * (1 - 1e-9)
        assert rank == 1 or squares[: rank - 1].sum() < share * squares.sum()


def check_base(layer: Layer, base: Tensor, delta: Tensor) -> None:
    assert layer.base is not None and layer.base.amplification is not None
    measured, amplified = layer.base, layer.base.amplification
    assert measured.weight_norm == pytest.approx(float(base.norm()), rel=1e-6)
    assert measured.relative == pytest.approx(float(delta.norm() / base.norm()), rel=1e-6)
    rank = int(torch.linalg.matrix_rank(delta))
    u, _, vh = torch.linalg.svd(delta)
    assert amplified.rank == rank
    assert amplified.along_change == pytest.approx(float((u[:, :rank].t() @ base @ vh[:rank].t()).norm()), rel=1e-5)
    assert amplified.along_own == pytest.approx(float(torch.linalg.svdvals(base)[:rank].norm()), rel=1e-5)
    assert measured.error == 0  # small enough for full decompositions
    assert measured.intruders.certain == dense_intruders(base, delta)
    assert measured.intruders.undecided == 0


def dense_intruders(base: Tensor, delta: Tensor) -> int:
    if base.shape[0] > base.shape[1]:
        base, delta = base.t(), delta.t()
    u, tuned = (torch.linalg.svd(w, full_matrices=False).U for w in (base, base + delta))
    return int(((u.t() @ tuned[:, :LEADING]).abs().amax(0) < THRESHOLD).sum())


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_the_dense_change(case: str, tmp_path: Path) -> None:
    model, base, adapter = prepare(tmp_path, case)
    dense = dense_changes(model, adapter)
    alone, beside = inspect_adapter(adapter), inspect_adapter(adapter, base)
    assert {layer.measure.path for layer in alone.layers} == set(dense)
    for one, other in zip(alone.layers, beside.layers, strict=True):
        assert one.measure == other.measure
        assert one.base is None
        weight, delta = dense[one.measure.path]
        check_change(one, delta)
        check_base(other, weight, delta)


def test_given_rank_and_parameters_are_those_that_were_trained(tmp_path: Path) -> None:
    for case, rank, numbers in (
        ("llama pissa", R, R * (16 + 24)),
        ("gpt2 parts", R, 2 * R * 16 + 2 * R * 16),
        ("llama embedding", R, R * (16 + 32)),
    ):
        model, _, adapter = prepare(tmp_path / case.replace(" ", "-"), case)
        first = inspect_adapter(adapter).layers[0].measure
        assert (first.rank, first.parameters) == (rank, numbers)
        assert first.scale == pytest.approx(ALPHA / R)
        lowrank.load_adapter(model, adapter)
        layer = dict(lora_layers(model))[first.path]
        assert first.parameters == sum(tensor.numel() for tensor in layer.factors("default").trainable())


def test_a_start_that_peft_took_off_the_base_is_found_again(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    base = save_base(models.llama(), tmp_path / "base")
    before = models.llama().state_dict()
    peft = get_peft_model(
        models.llama(), PeftConfig(r=R, lora_alpha=ALPHA, target_modules=["v_proj"], init_lora_weights="pissa")
    )
    models.disturb_peft(peft)
    peft.save_pretrained(tmp_path / "adapter")
    after = peft.merge_and_unload().state_dict()
    alone, beside = inspect_adapter(tmp_path / "adapter"), inspect_adapter(tmp_path / "adapter", base)
    for layer in beside.layers:
        key = f"{layer.measure.path}.weight"
        assert layer.measure.norm == pytest.approx(float((after[key] - before[key]).norm()), rel=1e-4)
    assert any("pissa" in note and "give the base" in note for note in alone.notes)
    assert not any("give the base" in note for note in beside.notes)


@torch.no_grad()
def test_dora_is_its_low_rank_part_and_the_whole_change_beside_it(tmp_path: Path) -> None:
    model = models.llama().double()
    base = save_base(model, tmp_path / "base", torch.float64)
    adapter = save_adapter(model, tmp_path / "a", r=R, lora_alpha=ALPHA, target_modules=["q_proj"], use_dora=True)
    whole = dense_changes(model, adapter)
    lowrank.load_adapter(model, adapter)
    inspection = inspect_adapter(adapter, base)
    for layer in inspection.layers:
        factors = dict(lora_layers(model))[layer.measure.path].factors("default")
        weight, change = whole[layer.measure.path]
        assert layer.measure.dora
        check_change(layer, factors.scale * factors.b @ factors.a)
        assert layer.base is not None
        assert layer.base.dora_change == pytest.approx(float(change.norm() / weight.norm()), rel=1e-6)
        assert layer.base.dora_gain == pytest.approx(float((factors.magnitude / weight.norm(dim=1)).mean()), rel=1e-6)
        assert layer.base.intruders.certain == dense_intruders(weight, change)
    assert any("DoRA" in note for note in inspection.notes)


def test_a_weight_too_large_for_full_decompositions(tmp_path: Path) -> None:
    """One Linear of 700 × 900, whose leading directions have to be found, in bfloat16 as bases are."""
    model = nn.Sequential(nn.Linear(900, 700, bias=False)).to(torch.bfloat16)
    base = tmp_path / "base"
    save_base(model, base, torch.bfloat16)
    adapter = save_adapter(model, tmp_path / "a", r=R, lora_alpha=8 * R, target_modules=["0"])
    (path, (weight, _)) = next(iter(dense_changes(model, adapter).items()))
    lowrank.load_adapter(model, adapter)
    factors = dict(lora_layers(model))[path].factors("default")
    delta = factors.scale * factors.b.double() @ factors.a.double()
    layer = inspect_adapter(adapter, base).layers[0]
    assert layer.base is not None and layer.base.amplification is not None
    assert 0 < layer.base.error <= 1e-3
    assert layer.base.intruders.certain == dense_intruders(weight.double(), delta.detach()) > 0
    assert layer.base.intruders.undecided == 0
    own = torch.linalg.svdvals(weight.double())[:R].norm()
    assert layer.base.amplification.along_own == pytest.approx(float(own), rel=1e-4)


def test_a_head_that_is_stored_as_its_embedding(tmp_path: Path) -> None:
    model = models.gpt2()
    base = save_base(model, tmp_path / "base")
    with pytest.warns(lowrank.LowrankWarning):
        adapter = save_adapter(model, tmp_path / "a", r=R, lora_alpha=ALPHA, target_modules=["lm_head"])
    layer = inspect_adapter(adapter, base).layers[0]
    assert layer.base is not None
    assert layer.base.weight_norm == pytest.approx(float(model.transformer.wte.weight.norm()), rel=1e-6)


def compared(tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    model = models.llama().double()
    one = save_adapter(model, tmp_path / "one", r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    other = save_adapter(model, tmp_path / "other", seed=2, r=5, lora_alpha=2, target_modules=["q_proj", "up_proj"])
    return model, one, other


def test_comparison_is_that_of_the_dense_changes(tmp_path: Path) -> None:
    model, one, other = compared(tmp_path)
    dense = {folder: dense_changes(model, folder) for folder in (one, other)}
    inspection = inspect_adapter(one, against=other)
    shared = [layer for layer in inspection.layers if layer.against is not None]
    assert [layer.measure.path for layer in shared] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    for layer in shared:
        (_, w), (_, x) = (dense[folder][layer.measure.path] for folder in (one, other))
        pair = layer.against
        assert pair is not None and pair.left is not None and pair.right is not None and pair.a is not None
        assert pair.cosine == pytest.approx(float((w * x).sum() / (w.norm() * x.norm())), abs=1e-8)
        assert pair.growth == pytest.approx(float((w + x).norm() / math.hypot(w.norm(), x.norm())), abs=1e-8)
        (u, _, vh), (u2, _, vh2) = torch.linalg.svd(w), torch.linalg.svd(x)
        v, v2 = vh.t(), vh2.t()
        assert pair.disturbed_by == pytest.approx(float((x @ v[:, :3]).norm() / w.norm()), abs=1e-8)
        assert pair.disturbs == pytest.approx(float((w @ v2[:, :5]).norm() / x.norm()), abs=1e-8)
        for i, j in ((1, 1), (2, 4), (3, 5)):
            left = float((u[:, :i].t() @ u2[:, :j]).norm() ** 2) / min(i, j)
            right = float((v[:, :i].t() @ v2[:, :j]).norm() ** 2) / min(i, j)
            assert pair.left.grid[i - 1][j - 1] == pytest.approx(left, abs=1e-8)
            assert pair.right.grid[i - 1][j - 1] == pytest.approx(right, abs=1e-8)
        assert pair.right.random == pytest.approx(5 / 16)
        assert pair.a.whole == pytest.approx(pair.right.whole, abs=1e-8)  # the same span, in another order
        squares = torch.linalg.svdvals(w + x).square()
        assert squares[: pair.rank_for_90].sum() >= 0.9 * squares.sum() > squares[: pair.rank_for_90 - 1].sum()


def test_what_is_not_shared_is_said(tmp_path: Path) -> None:
    _, one, other = compared(tmp_path)
    unshared = inspect_adapter(one, against=other).unshared
    assert unshared is not None
    assert unshared.only_ours == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    assert unshared.only_theirs == tuple(f"model.layers.{i}.mlp.up_proj" for i in range(2))
    assert unshared.other_shape == ()


def test_an_adapter_beside_itself(tmp_path: Path) -> None:
    _, one, _ = compared(tmp_path)
    for layer in inspect_adapter(one, against=one).layers:
        pair = layer.against
        assert pair is not None and pair.left is not None and pair.right is not None
        assert pair.cosine == pytest.approx(1)
        assert pair.growth == pytest.approx(math.sqrt(2))
        assert pair.disturbed_by == pair.disturbs == pytest.approx(1)
        for side in (pair.left, pair.right):
            assert [side.grid[i][i] for i in range(3)] == pytest.approx([1, 1, 1])
        assert pair.rank_for_90 == layer.measure.rank_for[0.9]


def test_unrelated_adapters_are_near_the_random_baseline(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(300, 200, bias=False) for _ in range(4)))
    folders = [
        save_adapter(model, tmp_path / str(seed), seed=seed, r=4, lora_alpha=9, target_modules="all-linear")
        for seed in (5, 6)
    ]
    for folder in folders:  # A and B drawn afresh, so that nothing is shared
        torch.manual_seed(int(folder.name))
        _redraw(folder)
    for layer in inspect_adapter(folders[0], against=folders[1]).layers:
        pair = layer.against
        assert pair is not None and pair.left is not None and pair.right is not None and pair.cosine is not None
        for side in (pair.left, pair.right):
            assert abs(side.whole - side.random) < 4 * side.spread
        assert abs(pair.cosine) < 0.05
        assert pair.growth == pytest.approx(1, abs=0.05)
        assert pair.disturbed_by == pytest.approx(pair.random_disturbed_by, rel=0.6)


def _redraw(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({key: torch.randn_like(tensor) for key, tensor in load_file(file).items()}, file)


@pytest.fixture
def idle(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(base, an adapter with ΔW = 0, one with ΔW ≠ 0)."""
    model = models.llama()
    base = save_base(model, tmp_path / "base")
    lowrank.inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    lowrank.save_adapter(model, tmp_path / "idle")
    lowrank.unload(model)
    return base, tmp_path / "idle", save_adapter(model, tmp_path / "busy", target_modules=["q_proj"])


def test_an_adapter_that_changes_nothing(idle: tuple[Path, Path, Path]) -> None:
    base, nothing, busy = idle
    inspection = inspect_adapter(nothing, base, against=busy)
    assert inspection.changes_nothing
    for layer in inspection.layers:
        assert layer.measure.norm == layer.measure.effective_rank == layer.measure.stable_rank == 0
        assert set(layer.measure.rank_for.values()) == {0}
        assert layer.base is not None and layer.base.amplification is None and layer.base.intruders.certain == 0
        assert layer.against is not None and layer.against.right is None and layer.against.cosine is None


def test_places_are_layers_and_kinds(tmp_path: Path) -> None:
    def seen(inspection: Inspection) -> set[tuple[int | None, str]]:
        return {(layer.place.layer, layer.place.module) for layer in inspection.layers}

    _, _, llama = prepare(tmp_path / "llama", "llama embedding")
    assert seen(inspect_adapter(llama)) == {(None, "embed_tokens"), (0, "v_proj"), (1, "v_proj")}
    _, _, t5 = prepare(tmp_path / "t5", "t5")
    names = {name for _, name in seen(inspect_adapter(t5))}
    assert {"encoder.SelfAttention.q", "decoder.SelfAttention.q", "decoder.EncDecAttention.q"} <= names
    assert len(names) == len({layer.measure.path.replace(".1.", ".0.") for layer in inspect_adapter(t5).layers})


def test_layers_come_in_natural_order(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)))
    adapter = save_adapter(model, tmp_path / "a", r=1, lora_alpha=3, target_modules="all-linear")
    assert [layer.measure.path for layer in inspect_adapter(adapter).layers] == [str(i) for i in range(11)]
    assert all(layer.measure.effective_rank == pytest.approx(1) for layer in inspect_adapter(adapter).layers)


def test_the_figures_do_not_depend_on_sharding(tmp_path: Path) -> None:
    model, base, adapter = prepare(tmp_path, "llama")
    sharded = save_base(model, tmp_path / "sharded", torch.float64, shard="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert inspect_adapter(adapter, sharded).layers == inspect_adapter(adapter, base).layers


def test_nothing_is_written(tmp_path: Path) -> None:
    _, base, adapter = prepare(tmp_path, "bert")
    copy = shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    inspection = inspect_adapter(adapter, base, against=adapter)
    for before, after in ((copy / "base", base), (copy / "adapter", adapter)):
        assert models.contents(before) == models.contents(after)
    assert inspection.full == {"classifier.weight": (3, 16), "classifier.bias": (3,)}
