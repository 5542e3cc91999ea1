"""Numbers that nothing can be computed with are said by name before a decomposition, a merge or a report."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import lowrank
from lowrank import LoraConfig
from lowrank.adapters.combine import combine_adapters
from lowrank.adapters.convert import convert_adapter
from lowrank.adapters.extract import extract_adapter
from lowrank.adapters.proposal import adapter_spectra
from lowrank.adapters.resize import resize_adapter
from lowrank.analysis.inspection import inspect_adapter
from lowrank.analysis.words import number
from lowrank.core.finite import all_finite
from lowrank.errors import ConfigError, Diverged, LowrankError, MergeError
from lowrank.train.evaluator import evaluate
from lowrank.train.generation import generate
from lowrank.train.settings import EvalSettings, GenerateSettings
from merge_disk_models import linear_factors, write_adapter, write_base
from train_models import save_llama

PATH = "layers.0.q_proj"
SHAPES = {f"{PATH}.weight": (6, 4), "layers.1.q_proj.weight": (6, 4)}


def adapter(folder, dtype=torch.float32, by=1.0, **config):
    factors = linear_factors(PATH, 6, 4)
    return write_adapter(folder, {name: tensor.to(dtype) * by for name, tensor in factors.items()}, **config)


HUGE = {
    "float64 factors": {"dtype": torch.float64, "by": 1e160},
    "alpha in float64": {"dtype": torch.float64, "lora_alpha": 1e308},
    "alpha": {"lora_alpha": 1e308},
}


@pytest.mark.parametrize("what", HUGE)
def test_a_change_too_large_is_refused_by_name(tmp_path, what):
    made = adapter(tmp_path / "in", **HUGE[what])
    base = write_base(tmp_path / "base", SHAPES, {})
    calls = {
        "inspect": lambda: inspect_adapter(made),
        "inspect with a base": lambda: inspect_adapter(made, base),
        "inspect against": lambda: inspect_adapter(made, against=made),
        "combine": lambda: combine_adapters([(made, 1.0), (made, 0.5)], tmp_path / "out"),
        "resize": lambda: resize_adapter(made, tmp_path / "out", rank=1),
        "rank": lambda: adapter_spectra(made),
        "merge": lambda: lowrank.merge_checkpoint(base, made, tmp_path / "out"),
    }
    for name, call in calls.items():
        with pytest.raises(LowrankError, match=PATH) as caught:
            call()
        assert "\n" not in str(caught.value), name
        assert not (tmp_path / "out").exists()


def test_a_weight_that_makes_it_too_large_is_refused_by_name(tmp_path):
    made = adapter(tmp_path / "in")
    for method in ("linear", "cat", "svd"):
        with pytest.raises(MergeError, match=PATH):
            combine_adapters([(made, 1e200), (made, 1.0)], tmp_path / "out", method=method)
    for method in ("ties", "dare_ties", "magnitude_prune"):
        with pytest.raises(MergeError, match=PATH):
            combine_adapters([(made, 1e200), (made, 1.0)], tmp_path / "out", method=method, density=0.5)


def with_value(folder, value):
    base = write_base(folder, SHAPES, {})
    tensors = load_file(base / "model.safetensors")
    tensors[f"{PATH}.weight"][2, 3] = value
    save_file(tensors, base / "model.safetensors")
    return base


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_base_with_such_a_value_is_named(tmp_path, value):
    made, base = adapter(tmp_path / "in"), with_value(tmp_path / "base", value)
    for method in (True, "pissa", "pissa_niter_2", "olora"):
        moved = adapter(tmp_path / f"in-{method}", init_lora_weights=method)
        with pytest.raises(LowrankError, match=PATH):
            inspect_adapter(moved, base)
        with pytest.raises(LowrankError, match=PATH):
            lowrank.merge_checkpoint(base, moved, tmp_path / "out")
    with pytest.raises(MergeError, match=PATH):
        extract_adapter(write_base(tmp_path / "plain", SHAPES, {}), base, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
    inspect_adapter(made)  # which never sees the base


@pytest.mark.parametrize("exact", [True, False])
def test_a_change_whose_squares_are_no_numbers_is_not_extracted(tmp_path, exact):
    plain, tuned = write_base(tmp_path / "plain", SHAPES, {}), with_value(tmp_path / "tuned", 1e30)
    if exact:  # float32 holds it, and LAPACK scales
        report = extract_adapter(plain, tuned, tmp_path / "out", rank=1, exact=True)
        assert report.kept == pytest.approx(1.0)
    else:
        with pytest.raises(MergeError, match=PATH):
            extract_adapter(plain, tuned, tmp_path / "out", rank=1)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_read_the_weight_name_it(method):
    model = nn.ModuleDict({"good": nn.Linear(4, 6), "bad": nn.Linear(4, 6)})
    with torch.no_grad():
        model["bad"].weight[1, 2] = float("inf")
    with pytest.raises(LowrankError, match="bad: W0 holds values that are not finite"):
        lowrank.inject(model, LoraConfig(r=2, target_modules=["good", "bad"], init_lora_weights=method))


def test_a_scale_beyond_float32_is_refused_in_memory_too():
    model = nn.ModuleDict({"lin": nn.Linear(4, 6)})
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=1e308, target_modules=["lin"], init_lora_weights="random"))
    with pytest.raises(MergeError, match=r"lin: its scale .* does not fit"), lowrank.merged(model):
        pass
    with pytest.raises(MergeError, match="lin: its scale"):
        lowrank.merge_and_unload(model)


def test_float8_is_looked_at_and_refused_where_factors_are_wanted(tmp_path):
    eight = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    assert all_finite(eight)
    assert not all_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))
    made = write_adapter(tmp_path / "in", linear_factors("lm_head", 6, 4))
    convert_adapter(made, tmp_path / "mlx", to="mlx")
    file = tmp_path / "mlx" / "adapters.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(LowrankError, match="float8"):
        convert_adapter(tmp_path / "mlx", tmp_path / "out")
    kept = {**linear_factors(PATH, 6, 4), "norm.weight": eight}
    whole = write_adapter(tmp_path / "full", kept, modules_to_save=["norm"])
    resize_adapter(whole, tmp_path / "small", rank=1)
    assert (
        load_file(tmp_path / "small" / "adapter_model.safetensors")["base_model.model.norm.weight"].dtype == eight.dtype
    )


@pytest.mark.parametrize("alpha", [10**400, float("inf"), float("nan")])
def test_an_alpha_is_a_number_that_a_float_can_be(alpha):
    with pytest.raises(ConfigError, match="lora_alpha must be a finite number"):
        LoraConfig(lora_alpha=alpha)
    with pytest.raises(ConfigError, match=r"alpha_pattern.* must be a finite number"):
        LoraConfig(alpha_pattern={"q_proj": alpha})


def test_numbers_in_reports_may_be_anything():
    assert [number(value) for value in (float("nan"), float("inf"), -float("inf"), 3.0)] == ["nan", "inf", "-inf", "3"]


def test_the_figures_of_large_changes_that_can_be_computed_are_finite(tmp_path):
    made = adapter(tmp_path / "in", torch.float64, by=1e70)
    layer = inspect_adapter(made).layers[0].measure
    assert layer.norm > 1e139 and layer.rank_for[0.9] >= 1
    assert json.loads(json.dumps(layer.sigma)) == list(layer.sigma)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_that_are_none_are_neither_written_nor_measured(tmp_path, temperature):
    """Finite factors whose product is not: the likeliest of NaN is a word, and perplexity a number, all the same."""
    base = save_llama(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(base)
    lowrank.inject(model, LoraConfig(target_modules=["v_proj"]))
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.fill_(1e30)
    lowrank.save_adapter(model, tmp_path / "huge")
    asked = {"model": str(base), "adapter": str(tmp_path / "huge")}
    with pytest.raises(Diverged, match="huge: the model's scores"):
        generate(GenerateSettings(**asked, prompt="the cat", temperature=temperature))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "the cat", "completion": "red"}) + "\n")
    with pytest.raises(Diverged, match=r"on .*rows\.jsonl is (nan|inf)"):
        evaluate(EvalSettings(**asked, data=str(rows)))
