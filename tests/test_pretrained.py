"""transformers' own saving of a model with adapters, and Trainer's checkpoints, with the real Trainer."""

import copy
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank
from checkpoint_models import answer, contents, disturb, is_plain, llama, snapshot
from lowrank import LoraConfig
from lowrank.errors import CheckpointError, LowrankError

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "lowrank.json"}


def injected(**options):
    model = llama()
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]}
    lowrank.inject(model, LoraConfig(**config | options))
    return model


def tied(**options):
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], **options))
    return model


@pytest.mark.parametrize("saved", [[], ["lm_head"], ["embed_tokens"]], ids=str)
def test_save_pretrained_writes_an_adapter_that_peft_and_we_load(saved, tmp_path):
    from peft import PeftModel

    model = disturb(injected(modules_to_save=saved))
    model.save_pretrained(tmp_path / "a")
    lowrank.save_adapter(model, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    torch.testing.assert_close(answer(theirs), answer(model), rtol=1e-5, atol=1e-5)


def test_from_pretrained_of_the_folder_is_the_base_with_the_adapter(tmp_path):
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]))
    disturb(model).save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(answer(again), answer(model), rtol=1e-5, atol=1e-5)


def test_several_adapters_lie_as_peft_lays_them(tmp_path):
    from peft import PeftModel

    model = injected()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["o_proj"]), "other")
    disturb(model)
    disturb(model, "other")
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    theirs.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        theirs.set_adapter(name)
        lowrank.set_active(model, [name])
        torch.testing.assert_close(answer(theirs.eval()), answer(model), rtol=1e-5, atol=1e-5)


def test_files_beside_the_adapter_stay_and_the_hub_is_not_written_to(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    model = injected()
    model.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == ADAPTER | {"tokenizer.json"}
    with pytest.raises(CheckpointError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(clone, tmp_path):
    model = disturb(injected())
    other = disturb(clone(model), seed=2)
    other.save_pretrained(tmp_path / "a")
    lowrank.save_adapter(other, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not torch.equal(answer(other), answer(model))


@pytest.mark.parametrize(
    "leave", [lowrank.unload, lowrank.merge_and_unload, lambda m: lowrank.delete_adapter(m, "default")]
)
def test_without_adapters_the_model_saves_itself_again(leave, tmp_path):
    model = disturb(injected())
    leave(model)
    assert "save_pretrained" not in model.__dict__ and not model._load_state_dict_post_hooks
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= set(contents(tmp_path))
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(answer(again), answer(model))


def test_a_state_dict_that_lacks_more_than_the_base_still_says_so(tmp_path):
    model = disturb(injected())
    state = dict(model.state_dict())
    own = {key: tensor for key, tensor in state.items() if "lora_" in key}
    assert not injected().load_state_dict(own, strict=False).missing_keys
    first, *rest = own
    assert injected().load_state_dict({key: own[key] for key in rest}, strict=False).missing_keys == [first]
    with pytest.raises(RuntimeError, match="Missing key"):
        injected().load_state_dict({key: own[key] for key in rest})
    assert set(injected().load_state_dict({}, strict=False).missing_keys) == state.keys()
    one_more = {"lm_head.weight": state["lm_head.weight"]}
    assert set(injected().load_state_dict(own | one_more, strict=False).missing_keys) == state.keys() - own.keys() - {
        "lm_head.weight"
    }


# Trainer


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of tokens, made from their number."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.arange(3, 11) + index
        return {"input_ids": ids, "labels": ids}


def train(model, folder, resume=None, **options):
    """The losses of six steps by Trainer, two rows each, a checkpoint after every second."""
    from transformers import Trainer, TrainingArguments

    arguments = {
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    trainer = Trainer(
        model, TrainingArguments(str(folder), **arguments | options), train_dataset=Rows(), eval_dataset=Rows()
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CASES = {
    "plain": injected,
    "scales that differ": lambda: injected(alpha_pattern={"up_proj": 5}, rank_pattern={"q_proj": 2}),
    "pissa": lambda: injected(init_lora_weights="pissa"),
    "dora": lambda: injected(use_dora=True),
    "tied head": lambda: tied(modules_to_save=["lm_head"]),
    "tied table": lambda: tied(modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_is_the_one_that_never_stopped(case, tmp_path, caplog):
    """Checkpoints hold the adapter and nothing of the base; resuming gives its very bits, and so the same losses."""
    whole = CASES[case]()
    before = snapshot(whole)
    _, losses = train(whole, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert set(contents(checkpoint)) >= ADAPTER and "config.json" not in contents(checkpoint)
    keys = load_file(checkpoint / "model.safetensors").keys()
    trained = {key for key, tensor in whole.state_dict().items() if not torch.equal(tensor, before[key])}
    assert trained and trained <= keys and not any(key.endswith("k_proj.weight") for key in keys)
    resumed = CASES[case]()
    with caplog.at_level(logging.WARNING):
        _, rest = train(resumed, tmp_path / "resumed", checkpoint)
    assert "missing keys" not in caplog.text
    assert rest[-2:] == losses[-2:]
    state = resumed.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in whole.state_dict().items())
    loaded = lowrank.unload(CASES[case]())
    lowrank.load_adapter(loaded, tmp_path / "whole" / "checkpoint-6")
    torch.testing.assert_close(answer(loaded), answer(whole.eval()), rtol=1e-4, atol=1e-4)


def test_resuming_with_another_adapter_is_refused(tmp_path):
    train(injected(), tmp_path / "run")
    other = llama()
    lowrank.inject(other, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"]), "other")
    with pytest.raises(LowrankError, match="is of another adapter than the model"):
        train(other, tmp_path / "resumed", tmp_path / "run" / "checkpoint-4")


def test_the_best_model_comes_back_at_the_end_and_is_what_is_saved(tmp_path):
    model = injected()
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 2.0}  # the first is best
    trainer, _ = train(model, tmp_path / "run", **options)
    best = trainer.state.best_model_checkpoint
    assert best and not best.endswith("checkpoint-6"), "the last checkpoint is the best: nothing is tested"
    kept = load_file(f"{best}/model.safetensors")
    state = model.state_dict()
    assert kept and all(torch.equal(state[key], tensor) for key, tensor in kept.items())
    trainer.save_model(str(tmp_path / "final"))
    assert set(contents(tmp_path / "final")) == ADAPTER | {"training_args.bin"}


def test_a_plain_module_is_left_to_itself():
    model = nn.Sequential(nn.Linear(4, 4))
    before = snapshot(model)
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    assert "save_pretrained" not in model.__dict__
    lowrank.unload(model)
    assert is_plain(model, before)
