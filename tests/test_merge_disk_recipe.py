"""A merged model keeps how rows became tokens: eval and generate ask it as they asked the base with the adapter."""

import json
from dataclasses import replace

import pytest

import lowrank
from lowrank.data.recipe import Recipe, read_recipe
from lowrank.train import evaluate, generate
from lowrank.train.settings import EvalSettings, GenerateSettings
from merge_disk_models import linear_factors, write_adapter, write_base

RECIPE = Recipe("completion", "Q: {prompt}\nA:", 64, columns=(("prompt_column", "question"),))


def with_recipe(folder, recipe):
    (folder / "run.json").write_text(json.dumps({"recipe": recipe.as_json(), "steps": 3}))


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", {f"layers.{i}.q_proj.weight": (6, 4) for i in range(2)}, {})


def adapter(folder, layer=0):
    return write_adapter(folder, linear_factors(f"layers.{layer}.q_proj", 6, 4))


def test_the_recipe_goes_with_the_model_and_nothing_else_of_the_run(tmp_path, base):
    made = adapter(tmp_path / "one")
    with_recipe(made, RECIPE)
    for name in ("train.yaml", "log.jsonl"):
        (made / name).write_text("x")
        (base / name).write_text("of another training")
    lowrank.merge_checkpoint(base, made, tmp_path / "merged")
    assert read_recipe(tmp_path / "merged") == RECIPE
    assert json.loads((tmp_path / "merged" / "run.json").read_text()).keys() == {"recipe"}
    assert not (tmp_path / "merged" / "train.yaml").exists()
    assert not (tmp_path / "merged" / "log.jsonl").exists()


def test_adapters_that_were_asked_alike_keep_it_others_are_told(tmp_path, base):
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", 1)
    with_recipe(one, RECIPE)
    with_recipe(two, RECIPE)
    lowrank.merge_checkpoint(base, [one, two], tmp_path / "alike")
    assert read_recipe(tmp_path / "alike") == RECIPE
    with_recipe(two, Recipe("completion", "{prompt}\n", 64))
    report = lowrank.merge_checkpoint(base, [one, two], tmp_path / "unlike")
    assert read_recipe(tmp_path / "unlike") is None
    assert any("different prompts" in note for note in report.notes)


def test_a_bases_own_recipe_is_not_the_results(tmp_path, base):
    """`eval --adapter` asks by the adapter's recipe, and by none where it has none: so does the result."""
    with_recipe(base, RECIPE)
    lowrank.merge_checkpoint(base, adapter(tmp_path / "one"), tmp_path / "merged")
    assert read_recipe(tmp_path / "merged") is None


CHAT = Recipe("chat", "{prompt}\n", 64, chat_template="{{ messages[0].content }}\n", template_of="a file")


def test_the_chat_template_trained_with_becomes_the_results(tmp_path, base):
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", 1)
    with_recipe(one, CHAT)
    with_recipe(two, replace(CHAT, max_length=32))
    for number, (own, said) in enumerate(((None, False), ("other", True), (CHAT.chat_template, None))):
        if own is not None:
            (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": own}))
        place = tmp_path / f"merged{number}"
        notes = lowrank.merge_checkpoint(base, [one, two], place).notes
        written = place / "chat_template.jinja"
        assert written.is_file() == (said is not None)
        assert any("not the one of the base" in note for note in notes) == bool(said)
        if said is not None:
            assert written.read_bytes() == CHAT.chat_template.encode()
            assert any("chat_template.jinja is the chat template that was trained with" in note for note in notes)


def test_a_template_beside_the_base_gives_way_and_different_ones_leave_it(tmp_path, base):
    (base / "chat_template.jinja").write_text("the base's")
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", 1)
    with_recipe(one, CHAT)
    with_recipe(two, RECIPE)
    lowrank.merge_checkpoint(base, one, tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == CHAT.chat_template
    report = lowrank.merge_checkpoint(base, [one, two], tmp_path / "both")
    assert (tmp_path / "both" / "chat_template.jinja").read_text() == "the base's"
    assert any("different chat templates" in note for note in report.notes)


def test_a_merged_model_is_served_in_the_template_trained_with(tmp_path):
    from transformers import AutoTokenizer

    from lowrank.nano import model_path

    made = write_adapter(tmp_path / "one", linear_factors("model.layers.0.self_attn.q_proj", 128, 128))
    with_recipe(made, CHAT)
    lowrank.merge_checkpoint(model_path(), made, tmp_path / "merged")
    served = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert served.chat_template == CHAT.chat_template


def test_eval_and_generate_answer_alike_before_and_after(tmp_path):
    from transformers import AutoModelForCausalLM

    from lowrank.nano import model_path

    model = AutoModelForCausalLM.from_pretrained(model_path())
    lowrank.inject(model, lowrank.LoraConfig(r=2, lora_alpha=3, init_lora_weights="random"))
    lowrank.save_adapter(model, tmp_path / "adapter")
    with_recipe(tmp_path / "adapter", RECIPE)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"the cat {i}", "completion": "sat"}) + "\n" for i in range(4)))
    lowrank.merge_checkpoint(model_path(), tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    common = {"device": "cpu", "dtype": "float32"}
    scores, texts = [], []
    for where in ({"model": "nano", "adapter": str(tmp_path / "adapter")}, {"model": str(tmp_path / "merged")}):
        scores.append(evaluate(EvalSettings(**where, **common, data=str(data))).scores)
        texts.append(generate(GenerateSettings(**where, **common, prompt="the cat", max_new_tokens=8)))
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-4)
    assert texts[0] == texts[1]
