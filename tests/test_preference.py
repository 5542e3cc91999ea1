"""Rows that prefer: every shape is the same pair, and the loss is DPO's with the adapter-less model as reference."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dpo_model
import lowrank
from families import build
from lowrank import LoraConfig, inject
from lowrank.data.batches import collate
from lowrank.data.dataset import read_dataset
from lowrank.data.preference import halves, joined, one_behind_the_other
from lowrank.data.recipe import make_recipe
from lowrank.data.settings import DataSettings
from lowrank.data.tokens import IGNORED, Example, encode, prompt_ids
from lowrank.errors import DataError
from lowrank.injection.adapters import lora_layers
from lowrank.train.head import find_head
from lowrank.train.metrics import of_preferences
from lowrank.train.preference import PreferenceLoss
from lowrank.train.recipes import recipe_of
from lowrank.train.task import Loaded
from train_models import WORDS, tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ {'system': ' very ', 'user': ' film ', 'assistant': ' -> '}[m.role] }}"
    "{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %} -> {% endif %}"
)
CPU = torch.device("cpu")
S, U, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("system", "the"), ("user", "what is red ?"), ("assistant", "good cat"), ("assistant", "bad"))
)


def said(role, text):
    return {"from": role, "value": text}


def read(tmp_path, *rows, **settings):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_dataset(path, DataSettings(**settings))


def examples(data, longest=512, **settings):
    tok = tokenizer()
    tok.chat_template = TEMPLATE
    recipe = make_recipe(DataSettings(**settings), data.kind, tok, longest, (), speaks=data.speaks)
    return encode(data, tok, recipe)


CHATS = {
    "messages": {"prompt": [S, U], "chosen": [GOOD], "rejected": [BAD]},
    "one message": {"prompt": [S, U], "chosen": GOOD, "rejected": BAD},
    "strings after messages": {"prompt": [S, U], "chosen": "good cat", "rejected": "bad"},
    "implicit": {"chosen": [S, U, GOOD], "rejected": [S, U, BAD]},
    "prompt beside whole conversations": {"prompt": "what", "chosen": [S, U, GOOD], "rejected": [S, U, BAD]},
    "sharegpt": {
        "conversations": [said("system", "the"), said("human", "what is red ?")],
        "chosen": said("gpt", "good cat"),
        "rejected": said("gpt", "bad"),
    },
    "sharegpt, system beside": {
        "conversations": [said("human", "what is red ?")],
        "system": "the",
        "chosen": said("gpt", "good cat"),
        "rejected": said("gpt", "bad"),
    },
}


@pytest.mark.parametrize("shape", CHATS)
def test_every_shape_of_conversation_is_the_same_pair(tmp_path, shape):
    data = read(tmp_path, CHATS[shape])
    assert data.kind == "preference"
    (row,) = data.rows
    for chat, answer in ((row.chat, GOOD), (row.rejected, BAD)):
        assert [dict(message.fields) for message in chat.messages] == [S, U, answer]
        assert chat.given == 2


def trained_words(example):
    return [WORDS[int(label)] for label in example.labels if label != IGNORED]


def test_strings_with_a_prompt_are_two_completions(tmp_path):
    row = {"prompt": "what is red ?", "chosen": "the cat", "rejected": "a dog"}
    (example,) = examples(read(tmp_path, row)).examples
    chosen, rejected = halves(example)
    assert [WORDS[i] for i in chosen.ids] == ["<s>", "what", "is", "red", "?", "the", "cat", "</s>"]
    assert trained_words(chosen) == ["the", "cat", "</s>"]
    assert trained_words(rejected) == ["a", "dog", "</s>"]


def test_of_two_whole_texts_what_they_share_is_the_prompt(tmp_path):
    row = {"chosen": "what is red ? the cat", "rejected": "what is red ? a cat"}
    (example,) = examples(read(tmp_path, row)).examples
    chosen, rejected = halves(example)
    assert trained_words(chosen) == ["the", "cat", "</s>"]
    assert trained_words(rejected) == ["a", "cat", "</s>"]


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "same answer"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "'rejected' is empty"),
        ({"prompt": "p", "chosen": "a"}, "prompt \\+ completion|none of"),
        ({"chosen": [S, U], "rejected": [S, U, BAD]}, "no assistant turn|end in an answer"),
        ({"prompt": [U], "chosen": [GOOD, U], "rejected": [GOOD, U, BAD]}, "end in an answer"),
    ],
)
def test_rows_that_do_not_prefer_are_said(tmp_path, row, complaint):
    with pytest.raises(DataError, match=complaint):
        read(tmp_path, row)


def test_both_answers_keep_the_same_prompt_when_it_is_cut(tmp_path):
    row = {"prompt": "what is the red cat ?", "chosen": "the very very good cat", "rejected": "bad"}
    found = examples(read(tmp_path, row), longest=9)
    assert found.cut == 1
    chosen, rejected = halves(found.examples[0])
    assert len(chosen.ids) == 9
    assert chosen.ids[: len(chosen.ids) - 6] == rejected.ids[: len(rejected.ids) - 2]
    assert trained_words(chosen)[-2:] == ["cat", "</s>"] and trained_words(rejected) == ["bad", "</s>"]
    with pytest.raises(DataError, match="raise --max-length"):
        examples(read(tmp_path, row), longest=5)


def test_chats_lose_the_same_old_exchanges(tmp_path):
    old = [{"role": "user", "content": "what is black ?"}, {"role": "assistant", "content": "the black dog"}]
    row = {"prompt": [*old, U], "chosen": [GOOD], "rejected": [BAD]}
    short = {"prompt": [U], "chosen": [GOOD], "rejected": [BAD]}
    (wanted,) = examples(read(tmp_path, short)).examples
    longest = max(len(side.ids) for side in halves(wanted))
    found = examples(read(tmp_path, row), longest=longest)
    assert list(found.examples) == [wanted] and found.cut == 1


def test_conversations_whose_answers_never_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TEMPLATE", TEMPLATE.replace("eos_token", "''"))
    with pytest.raises(DataError, match="no special token after an answer"):
        examples(read(tmp_path, CHATS["messages"]))


def adapted(seed=0, dtype=torch.float64):
    model = build("gemma2")
    torch.manual_seed(seed)
    inject(model, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", modules_to_save=["norm"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


PAIRS = [
    joined(Example([5, 9, 3, 17, 2], [IGNORED, IGNORED, IGNORED, 17, 2]), Example([5, 9, 3, 4], [IGNORED] * 3 + [4])),
    joined(Example([8, 21], [IGNORED, 21]), Example([8, 6, 29, 3, 2, 7], [IGNORED, 6, 29, 3, 2, 7])),
]


def of_one_row(model, row):
    """log p of an answer, a token at a time."""
    logits = model(torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[i - 1, label] for i, label in enumerate(row.labels) if label != IGNORED)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_the_loss_is_the_papers_formula_and_so_is_its_gradient(beta, alone):
    model = adapted()
    margins = []
    for pair in map(halves, PAIRS):
        with torch.no_grad(), lowrank.disabled(model):
            reference = [of_one_row(model, row) for row in pair]
        own = [of_one_row(model, row) for row in pair]
        margins.append(beta * ((own[0] - reference[0]) - (own[1] - reference[1])))
    wanted = sum(-torch.log(torch.sigmoid(margin)) for margin in margins)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    head = find_head(model) if alone else None
    loss = PreferenceLoss(beta, head, 2)(model, collate(one_behind_the_other(PAIRS), 0, CPU, True))
    loss.total.backward()
    assert loss.total.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert loss.count == 2
    figures = of_preferences(loss.tallies, 2)
    assert figures["margin"] == pytest.approx(sum(margins).item() / 2, rel=1e-9)
    assert figures["margin"] == pytest.approx(figures["chosen_reward"] - figures["rejected_reward"])
    assert figures["accuracy"] == sum(float(margin > 0) for margin in margins) / 2
    assert gradients
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-8)  # norms are float32


def test_a_model_without_an_adapter_is_its_own_reference():
    loss = PreferenceLoss()(build("llama"), collate(one_behind_the_other(PAIRS), 0, CPU, True))
    assert loss.total.item() == pytest.approx(2 * math.log(2))
    assert of_preferences(loss.tallies, 2)["accuracy"] == 0.5


def test_the_reference_has_nobodys_dropout():
    model, batch = adapted().train(), collate(one_behind_the_other(PAIRS), 0, CPU, True)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    loss_of = PreferenceLoss()
    assert not torch.equal(loss_of._answers(model, batch), loss_of._answers(model, batch))
    assert torch.equal(loss_of._reference(model, batch), loss_of._reference(model, batch))


def test_the_reference_leaves_the_model_as_it_was():
    model = adapted().train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    PreferenceLoss()(model, collate(one_behind_the_other(PAIRS), 0, CPU, True)).total.backward()
    assert model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert all(dict(model.named_parameters())[name].grad is not None for name in trained)


TRL = json.loads((Path(__file__).parent / "goldens" / "trl_dpo.json").read_text())  # scripts/trl_dpo.py made it


def test_tokens_and_masks_are_those_of_trl(tmp_path):
    found = examples(read(tmp_path, *dpo_model.ROWS), template="{prompt}").examples
    for number, row in enumerate(one_behind_the_other(found)):
        real = sum(TRL["attention"][number])
        assert list(row.ids) == TRL["ids"][number][:real]
        assert [int(label != IGNORED) for label in row.labels] == TRL["trained"][number][:real]


def test_loss_figures_and_gradients_are_those_of_trl(tmp_path):
    model = dpo_model.plain_model()
    inject(model, LoraConfig(r=dpo_model.RANK, lora_alpha=4 * dpo_model.RANK, target_modules=dpo_model.TARGETS))
    factors = {}
    for path, layer in lora_layers(model):
        own = layer.factors("default")
        factors |= {f"{path}.A": own.a, f"{path}.B": own.b}
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(dpo_model.wave(factor.shape, name))
    rows = examples(read(tmp_path, *dpo_model.ROWS), template="{prompt}").examples
    loss_of = PreferenceLoss(dpo_model.BETA, find_head(model), 4)
    loss = loss_of(model.train(), collate(one_behind_the_other(rows), 0, CPU, True))
    (loss.total / loss.count).backward()
    assert loss.total.item() / loss.count == pytest.approx(TRL["loss"], rel=1e-5)
    figures = of_preferences(loss.tallies, loss.count)
    for ours, theirs in {"accuracy": "accuracies", "margin": "margins", "chosen_reward": "chosen"}.items():
        assert figures[ours] == pytest.approx(TRL["figures"][f"rewards/{theirs}"], rel=1e-4)
    assert set(factors) == set(TRL["gradient_norms"])
    for name, factor in factors.items():
        assert float(factor.grad.norm()) == pytest.approx(TRL["gradient_norms"][name], rel=1e-3)


def test_whole_texts_are_asked_without_a_template(tmp_path):
    data = read(tmp_path, {"chosen": "what is red ? the cat", "rejected": "what is red ? a cat"})
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    recipe = recipe_of(DataSettings(), data, (), Loaded(model, tokenizer(), CPU, 0))
    assert (recipe.template, recipe.beta) == ("{prompt}", 0.1)
    assert prompt_ids(tokenizer(), recipe, "what is red ?") == [
        WORDS.index(word) for word in ["<s>", "what", "is", "red", "?"]
    ]
