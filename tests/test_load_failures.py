"""Whatever loading or injecting raises, the model is as it was; what a file lacks and its config speaks of is said."""

import copy
import json

import pytest
import torch

import lowrank
from checkpoint_models import answer, bert, disturb, is_plain, llama, silence, snapshot
from lowrank import LoraConfig
from lowrank.errors import CheckpointError, LowrankError, LowrankWarning, TargetError

SAVED = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}


@pytest.fixture
def adapter(tmp_path):
    model = llama()
    lowrank.inject(model, LoraConfig(**SAVED))
    lowrank.save_adapter(disturb(model), tmp_path / "a")
    return tmp_path / "a"


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def offloaded():
    from accelerate import cpu_offload

    return cpu_offload(llama(), torch.device("cpu"))


def on_meta():
    with torch.device("meta"):
        return llama()


@pytest.mark.parametrize("make", [offloaded, on_meta])
def test_a_base_without_values_is_refused_in_a_sentence(make, adapter):
    model = make()
    keys = set(model.state_dict())
    with pytest.raises(CheckpointError, match="on the meta device and have no values: load them first"):
        lowrank.load_adapter(model, adapter)
    assert set(model.state_dict()) == keys and not lowrank.adapter_configs(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_injecting_into_an_offloaded_base_is_refused_and_offloading_after_it_works(adapter):
    from accelerate import cpu_offload

    with pytest.raises(TargetError, match="accelerate offloads its weight: adapt the model before"):
        lowrank.inject(offloaded(), LoraConfig(**SAVED))
    model = llama()
    lowrank.load_adapter(model, adapter)
    wanted = answer(model)
    with pytest.raises(LowrankError, match="name the class of the adapted layers"):
        answer(cpu_offload(copy.deepcopy(model), torch.device("cpu")))
    cpu_offload(model, torch.device("cpu"), preload_module_classes=["LoraLinear"])
    assert model.model.layers[0].self_attn.q_proj.factors("default").a.is_meta
    assert torch.equal(answer(model), wanted)


PLACES = [
    "lowrank.checkpoint.load.changes_nothing",  # after all is in place
    "lowrank.injection.apply.add_override",  # half of it is in place
    "lowrank.injection.apply.add_hooks",  # nothing is yet
    "torch.Tensor.copy_",
]


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_whatever_is_raised_a_plain_model_stays_plain(place, error, adapter, monkeypatch):
    model = llama()
    before = snapshot(model)

    def fail(*_args, **_options):
        raise error("here")

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(error, match="here"):
            lowrank.load_adapter(model, adapter)
    assert is_plain(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    lowrank.load_adapter(model, adapter)  # and nothing stands in its way


@pytest.mark.parametrize("place", [PLACES[0], "torch.Tensor.clone"])
def test_an_adapter_that_was_active_is_active_and_trained_again(place, adapter, monkeypatch):
    model = llama()
    lowrank.inject(model, LoraConfig(**SAVED | {"modules_to_save": ["norm", "lm_head"]}), "mine")
    disturb(model, "mine")
    state, wanted = snapshot(model), answer(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    def fail(*_args, **_options):
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(MemoryError, match="full"):
            lowrank.load_adapter(model, adapter)
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(answer(model), wanted) and lowrank.active_adapters(model) == ("mine",)
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_an_injection_that_fails_leaves_a_plain_model(monkeypatch):
    model = llama()
    before = snapshot(model)

    def fail(*_args, **_options):
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("lowrank.injection.apply.add_override", fail)
        with pytest.raises(MemoryError):
            lowrank.inject(model, LoraConfig(**SAVED))
    assert is_plain(model, before)


@pytest.mark.parametrize("targets", [["q_proj", "k_prj"], ["k_proj"], r".*\.k_proj"], ids=str)
def test_a_target_that_no_tensor_answers_is_said(targets, adapter):
    rewrite(adapter, target_modules=targets)
    with pytest.warns(LowrankWarning, match="as target_modules, and the file has no tensor"):
        report = lowrank.load_adapter(llama(), adapter)
    assert "as target_modules" in str(report)


@pytest.mark.parametrize(("bias", "count"), [("all", "0 of 19"), ("lora_only", "0 of 2")])
def test_biases_that_the_file_does_not_hold_are_said(bias, count, tmp_path):
    model = bert()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["query"]))
    lowrank.save_adapter(disturb(model), tmp_path / "a")
    with silence():
        lowrank.load_adapter(bert(), tmp_path / "a")
    rewrite(tmp_path / "a", bias=bias)
    with pytest.warns(LowrankWarning, match=f"bias='{bias}', and the file holds {count} such biases"):
        lowrank.load_adapter(bert(), tmp_path / "a")


def test_a_model_without_biases_lacks_none(adapter):
    rewrite(adapter, bias="all")
    with silence():
        lowrank.load_adapter(llama(), adapter)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_number_that_is_null_is_refused_as_peft_does(name, adapter):
    from peft import PeftModel

    rewrite(adapter, **{name: None})
    with pytest.raises(TypeError):
        PeftModel.from_pretrained(llama(), adapter)
    with pytest.raises(CheckpointError, match=f"{name} is null"):
        lowrank.load_adapter(llama(), adapter)


def test_a_wrapper_is_named(adapter):
    model = torch.nn.DataParallel(llama())
    lowrank.load_adapter(model, adapter)
    assert lowrank.active_adapters(model.module) == ("default",)
    lowrank.save_adapter(model, adapter.parent / "b")
    with pytest.raises(LowrankError, match="this DataParallel is wrapped around the model that has the adapters"):
        lowrank.set_active(model, [])
