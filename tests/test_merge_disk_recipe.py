"""A merged model keeps how rows became tokens: eval and generate ask it as they asked the base with the adapter."""

import json

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
