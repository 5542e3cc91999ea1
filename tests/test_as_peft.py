"""An adapted model as a PeftModel: one model under two interfaces, and what Trainer and TRL call on it."""

import copy
import inspect

import peft
import pytest
import torch
from safetensors.torch import load_file

import lowrank
from checkpoint_models import answer, contents, disturb, llama, snapshot
from lowrank.errors import LowrankError
from lowrank.integrations import as_peft
from test_pretrained import ADAPTER, CASES, injected, train

VARIANTS = [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}]


def both(**options):
    model = disturb(injected(**options))
    return model, as_peft(model)


def test_it_is_the_model_under_another_interface():
    model, view = both()
    assert isinstance(view, peft.PeftModel) and view.get_base_model() is model
    assert as_peft(view) is view
    assert dict(view.named_parameters()) == dict(model.named_parameters())
    assert view.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(answer(view), answer(model)) and view.config is model.config
    view.train()
    assert model.training and model.lm_head.training
    view.eval()
    assert not model.training and not model.lm_head.training
    view.to(torch.float64)
    assert model.lm_head.weight.dtype is torch.float64
    with pytest.raises(LowrankError, match="has no adapter"):
        as_peft(llama())


def test_a_copy_of_it_is_one_model_too():
    model, view = both()
    other = copy.deepcopy(view)
    disturb(other.get_base_model(), seed=3)
    assert torch.equal(answer(other), answer(other.get_base_model()))
    assert not torch.equal(answer(other), answer(model))


def test_its_methods_take_what_pefts_take():
    ours = as_peft(injected())
    for name in ("set_adapter", "add_adapter", "merge_and_unload", "load_adapter", "save_pretrained"):
        theirs = getattr(peft.PeftModel, name, None) or getattr(peft.LoraModel, name)
        wanted = [n for n, p in inspect.signature(theirs).parameters.items() if p.default is p.empty and n != "self"]
        given = inspect.signature(getattr(ours, name)).parameters
        assert [name for name in wanted if name not in given and name != "kwargs"] == [], name


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_off_and_on(options):
    model, view = both(**options)
    whole, config = answer(model), view.peft_config["default"]
    with view.disable_adapter():
        assert torch.equal(answer(view), answer(llama()))
    assert torch.equal(answer(view), whole)
    trained = [name for name, parameter in view.named_parameters() if parameter.requires_grad]
    assert trained and all("lora" in name or "lm_head" in name for name in trained)
    assert view.active_adapter == "default" and view.active_adapters == ["default"]
    assert view.peft_config["default"] is config and (config.r, config.lora_alpha) == (3, 7)


@pytest.mark.parametrize(
    "options", [*VARIANTS, {"alpha_pattern": {"up_proj": 5}}, {"init_lora_weights": "pissa"}], ids=str
)
def test_a_reference_is_a_frozen_copy(options):
    """What TRL asks for as "ref": the adapter as it was, while the adapter is trained on."""
    model, view = both(**options)
    before = answer(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    view.add_adapter("ref", view.peft_config["default"])
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert view.active_adapter == "default" and torch.equal(answer(view), before)
    disturb(model, seed=5)
    assert not torch.equal(answer(view), before)
    view.set_adapter("ref")
    assert torch.equal(answer(view), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    view.set_adapter("default")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_a_new_adapters_reference_is_the_base(tmp_path):
    view = as_peft(injected())
    view.add_adapter("ref", view.peft_config["default"])
    assert list(view.peft_config) == ["default"]
    with pytest.raises(LowrankError, match=r"give it adapter 'other' by lowrank\.inject"):
        view.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))


def test_references_are_not_saved(tmp_path):
    model, view = both()
    view.add_adapter("ref", view.peft_config["default"])
    view.save_pretrained(tmp_path / "a")
    lowrank.save_adapter(model, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and not (tmp_path / "a" / "ref").exists()
    view.save_pretrained(tmp_path / "c", selected_adapters=["default", "ref"])
    assert (tmp_path / "c" / "ref" / "adapter_config.json").is_file()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_merged_parameters_are_the_merged_models_under_the_bases_names(options):
    """What is sent to an engine that generates (vLLM) between the steps."""
    model, view = both(**options)
    before = snapshot(model)
    names, prefix = {name for name, _ in llama().named_parameters()}, view.prefix
    view.merge_adapter()
    with pytest.raises(LowrankError):
        view.merge_adapter()
    sent = {name: parameter.detach().clone() for name, parameter in view.named_parameters() if prefix not in name}
    view.unmerge_adapter()
    view.unmerge_adapter()
    after = snapshot(model)
    assert sent.keys() == names and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    wanted = dict(view.merge_and_unload().named_parameters())
    assert all(torch.equal(sent[name], wanted[name]) for name in names)


@pytest.mark.parametrize("case", CASES)
def test_trainer_resumes_it_to_the_same_bits(case, tmp_path):
    """And its losses and checkpoints are those of the adapted model itself."""
    itself = CASES[case]()
    _, losses = train(itself, tmp_path / "itself")
    whole = CASES[case]()
    _, again = train(as_peft(whole), tmp_path / "whole")
    assert again == losses
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    weights = {
        name: content for name, content in contents(checkpoint).items() if name.endswith((".safetensors", ".json"))
    }
    theirs = contents(tmp_path / "itself" / "checkpoint-4")
    assert weights.keys() > ADAPTER
    assert all(content == theirs[name] for name, content in weights.items() if name != "trainer_state.json")
    resumed = CASES[case]()
    _, rest = train(as_peft(resumed), tmp_path / "resumed", checkpoint)
    assert rest[-2:] == losses[-2:]
    state = resumed.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in whole.state_dict().items())


def test_the_best_model_comes_back_at_the_end(tmp_path):
    model = injected()
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 2.0}  # the first is best
    trainer, _ = train(as_peft(model), tmp_path / "run", **options)
    best = trainer.state.best_model_checkpoint
    assert best and not best.endswith("checkpoint-6"), "the last checkpoint is the best: nothing is tested"
    kept, state = load_file(f"{best}/model.safetensors"), model.state_dict()
    assert kept and all(torch.equal(state[key], tensor) for key, tensor in kept.items())


def test_an_adapter_of_another_program_is_loaded_in_its_place(tmp_path):
    other = disturb(injected(), seed=7)
    lowrank.save_adapter(other, tmp_path)
    model, view = both()
    view.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(answer(view), answer(other))
    assert any(parameter.requires_grad for parameter in model.parameters())
    view.load_adapter(tmp_path, "second")
    view.delete_adapter("second")
    assert list(view.peft_config) == ["default"]


def test_zeros_third_stage_is_refused():
    """DeepSpeed marks the parameters that it takes apart; it is no dependency."""
    _, view = both()
    view.lm_head.weight.ds_id = 3
    with pytest.raises(LowrankError, match=r"ZeRO stage 3 .* use stage 1 or 2, or FSDP2"):
        view.train()
