"""An adapter at another rank: the best one below its own, the same one above it."""

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from checkpoint_models import answer, bert, convolutions, disturb, gpt2, llama
from combination_oracle import truncated
from lowrank import LoraConfig
from lowrank.adapters.resize import resize_adapter
from lowrank.checkpoint.adapter_folder import target_of
from lowrank.checkpoint.read import read_adapter
from lowrank.errors import CheckpointError, ConfigError, LowrankError

CONFIGS = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"layers.1.*q_proj": 3}}),
    "gpt2": (gpt2, {"target_modules": ["c_attn[q,v]", "c_fc"]}),
    "conv": (convolutions, {"target_modules": ["one", "two", "three"]}),
    "full": (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
    "dora": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "pissa": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
}


def make(case, folder):
    build, config = CONFIGS[case]
    model = build()
    lowrank.inject(model, LoraConfig(r=5, lora_alpha=8, **config))
    disturb(model)
    lowrank.save_adapter(model, folder)
    return build


def load(build, folder):
    model = build()
    lowrank.load_adapter(model, folder)
    return model


def by_peft(build, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(build(), folder).eval()


def targets(folder):
    files = read_adapter(folder)
    return {path: target_of(files, path) for path in files.low_rank}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_larger_rank_changes_nothing_but_leaves_room(tmp_path, case):
    build, rank = make(case, tmp_path / "in"), 9 if case == "conv" else 12  # no change of the small kernels has more
    report = resize_adapter(tmp_path / "in", tmp_path / "out", rank=rank)
    assert report.kept == 1.0
    assert {module.rank for module in report.modules} == {rank}
    wanted = answer(load(build, tmp_path / "in"))
    assert torch.allclose(answer(load(build, tmp_path / "out")), wanted, atol=1e-5)
    assert torch.allclose(answer(by_peft(build, tmp_path / "out")), wanted, atol=1e-5)
    before = targets(tmp_path / "in")
    for path, target in targets(tmp_path / "out").items():
        old = before[path].a.shape[0]
        assert target.scale == pytest.approx(before[path].scale)
        assert not target.b[:, old:].any()
        assert 0.4 < float(target.a[old:].square().mean() / target.a[:old].square().mean()) < 2.5


@pytest.mark.parametrize("case", CONFIGS)
def test_a_smaller_rank_is_the_best_of_that_rank(tmp_path, case):
    build = make(case, tmp_path / "in")
    report = resize_adapter(tmp_path / "in", tmp_path / "out", rank=2)
    before, after = targets(tmp_path / "in"), targets(tmp_path / "out")
    lost = total = 0.0
    for module in report.modules:
        old, new = before[module.path], after[module.path]
        delta = old.scale * old.b.double() @ old.a.double()
        best = truncated(delta, 2)
        got = new.scale * new.b.double() @ new.a.double()
        assert torch.allclose(got, best, atol=1e-5 * float(delta.norm()))
        assert new.a.shape[0] == 2
        assert new.scale == pytest.approx(old.scale)
        assert module.norm == pytest.approx(float(delta.norm()), rel=1e-6)
        lost += float((delta - got).square().sum())
        total += float(delta.square().sum())
    assert report.kept == pytest.approx(1 - lost / total, abs=1e-6)
    assert report.kept < 0.999
    assert torch.allclose(answer(load(build, tmp_path / "out")), answer(by_peft(build, tmp_path / "out")), atol=1e-5)


def test_by_energy_every_module_gets_the_rank_it_needs(tmp_path):
    make("llama", tmp_path / "in")
    report = resize_adapter(tmp_path / "in", tmp_path / "out", energy=0.9)
    for module in report.modules:
        old = targets(tmp_path / "in")[module.path]
        shares = torch.linalg.svdvals(old.b.double() @ old.a.double()).square().cumsum(0)
        assert module.rank == int((shares / shares[-1] < 0.9).sum()) + 1
        assert module.kept >= 0.9
    assert torch.allclose(answer(load(llama, tmp_path / "out")), answer(by_peft(llama, tmp_path / "out")), atol=1e-5)
    whole = resize_adapter(tmp_path / "in", tmp_path / "whole", energy=1.0)
    assert {module.rank for module in whole.modules} == {5}


def test_full_tensors_and_magnitudes_are_copied(tmp_path):
    for case, part in (("full", "classifier"), ("full", "bias"), ("dora", "magnitude")):
        make(case, tmp_path / part / "in")
        report = resize_adapter(tmp_path / part / "in", tmp_path / part / "out", rank=1)
        before, after = (load_file(tmp_path / part / name / "adapter_model.safetensors") for name in ("in", "out"))
        copied = [key for key in before if part in key]
        assert copied
        assert all(torch.equal(before[key], after[key]) for key in copied)
        assert ("magnitudes" in str(report)) == (case == "dora")


def test_old_pickles_are_read_where_that_is_allowed(tmp_path, shared):
    folder = shared / "adapters" / "lora_mlp-0.6.1"
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        resize_adapter(folder, tmp_path / "out", rank=4)
    resize_adapter(folder, tmp_path / "out", rank=4, allow_pickle=True)
    assert (
        load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.lin0.lora_A.weight"].shape[0] == 4
    )


def test_wrong_calls_are_one_sentence_and_leave_nothing(tmp_path):
    make("llama", tmp_path / "in")
    calls = {
        "give a rank": {},
        "rank must be": {"rank": 0},
        "rank must be a whole": {"rank": 2.5},
        "energy must be": {"energy": 0},
        "is the adapter itself": {"rank": 2, "out": tmp_path / "in"},
        "there is no folder": {"rank": 2, "adapter": tmp_path / "nowhere"},
    }
    for message, call in calls.items():
        with pytest.raises(LowrankError, match=message) as caught:
            resize_adapter(**{"adapter": tmp_path / "in", "out": tmp_path / "out"} | call)
        assert isinstance(caught.value, ConfigError | CheckpointError)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
