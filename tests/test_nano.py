"""nano: the shipped model is whole and fluent, and its skill is new, held out and always the same."""

import importlib.util
import json
import random
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.nano import model_path, rows
from lowrank.nano.words import NAMES, THINGS, held_out
from lowrank.nano.world import KINDS, document, questions, story

ROOT = Path(__file__).resolve().parents[1]
FIELD = re.compile(r"(\w+)\[(\w+)\]")


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)


@cache
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path(), local_files_only=True).eval()


@cache
def corpus() -> list[str]:
    rng = random.Random(3)
    return [document(rng) for _ in range(4000)]


def answers(prompts: list[str]) -> list[str]:
    """What the base writes greedily after each prompt, up to its end token."""
    found = []
    for prompt in prompts:
        ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
        out = model().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=90, do_sample=False)
        found.append(tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def test_the_shipped_folder_is_small_and_plain() -> None:
    files = {file.name: file.stat().st_size for file in model_path().iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(files.values()) < 8_000_000
    assert json.loads((model_path() / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert all(parameter.isfinite().all() for parameter in model().parameters())


def test_the_tokenizer_ends_and_pads_and_adds_nothing() -> None:
    assert tokenizer().is_fast
    assert tokenizer().eos_token_id == model().config.eos_token_id == model().generation_config.eos_token_id
    assert tokenizer().pad_token_id == model().config.pad_token_id != tokenizer().eos_token_id
    assert len(tokenizer()) == model().config.vocab_size
    assert tokenizer().convert_ids_to_tokens(tokenizer()("red kite")["input_ids"])[-1] == "Ġkite"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert tokenizer().decode(tokenizer()(text)["input_ids"]) == text


def test_the_base_writes_in_the_words_of_its_world_and_comes_to_an_end() -> None:
    known = set(re.findall(r"\w+", " ".join(corpus())))
    beginnings = ["One morning", "It is", "Every day Leo", "Mia has", "Ruth wakes up early and", "Today is"]
    for beginning, rest in zip(beginnings, answers(beginnings), strict=True):
        told = beginning + rest
        assert set(re.findall(r"\w+", told)) <= known, told
        assert rest[-1] in ".!?" or rest.count("\nA:"), told


def test_the_base_answers_questions_about_the_one_thing_it_read_of() -> None:
    rng = random.Random(11)
    asked = [text.split("\nA: ")[:2] for text in (questions(rng) for _ in range(80)) if len(things_in(text)) == 1]
    wanted = [answer.split("\n")[0] for _, answer in asked]
    told = [answer.strip().split("\n")[0] for answer in answers([f"{question}\nA:" for question, _ in asked])]
    right = sum(a == b for a, b in zip(told, wanted, strict=True))
    assert right >= 0.8 * len(asked) > 20, list(zip(told, wanted, strict=True))


def things_in(text: str) -> set[str]:
    """The things that a document speaks of."""
    return set(THINGS) & set(re.findall(r"\w+", text))


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_rows_are_the_same_every_time_and_more_only_append(split: Any) -> None:
    many = rows(split, 300)
    assert many == rows(split, 300)
    assert many[:40] == rows(split, 40)
    assert len({row.prompt for row in many}) == 300


def test_the_first_rows_are_these() -> None:
    assert rows("train", 1)[0].completion == "Ruth has a lovely blue carpet in the library with Noah."
    assert rows("held-out", 1)[0].prompt == "thing[cup], place[barn], colour[white], name[Lily]"


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_completion_says_every_value_once_and_its_split_is_its_pairs(split: Any) -> None:
    for prompt, completion in rows(split, 400):
        record = dict(FIELD.findall(prompt))
        assert held_out(record["name"], record["thing"]) == (split == "held-out")
        assert all(len(re.findall(rf"\b{value}\b", completion)) == 1 for value in record.values())
        assert completion.startswith(record["name"])
        assert completion.endswith(f" with {record['friend']}." if "friend" in record else f"{record['place']}.")


def test_held_out_pairs_are_an_eighth_and_spread_over_names_and_things() -> None:
    pairs = [(name, thing) for name in NAMES for thing in THINGS if held_out(name, thing)]
    assert 0.08 < len(pairs) / (len(NAMES) * len(THINGS)) < 0.17
    assert {name for name, _ in pairs} == set(NAMES)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="held-out"):
        rows("test", 1)  # type: ignore[arg-type]


def test_the_corpus_holds_no_record_and_no_held_out_owner() -> None:
    text = "\n".join(corpus())
    assert not re.search(r"(name|thing|colour|place|look|friend)\[", text)
    owned = re.findall(r"(\w+) (?:has|keeps) an? (?:\w+ )*?(\w+)(?: in the|\.|,)", text)
    told = [(name, thing) for name, thing in owned if name in NAMES and thing in THINGS]
    assert len(told) > 1000
    assert not [pair for pair in told if held_out(*pair)]
    assert not {row.prompt for row in rows("held-out", 200)} & set(text.split("\n"))
    assert not [row.completion for row in rows("held-out", 200) if row.completion in text]


def test_every_kind_of_document_occurs_and_a_seed_is_a_corpus() -> None:
    assert sum(KINDS.values()) == pytest.approx(1)
    assert [document(random.Random(5)) for _ in range(3)] == [document(random.Random(5)) for _ in range(3)]
    assert story(random.Random(1)) != story(random.Random(2))


def test_the_base_cannot_tell_a_record() -> None:
    unseen = rows("held-out", 60)
    told = answers([row.prompt + "\n" for row in unseen])
    right = sum(answer.strip() == row.completion for answer, row in zip(told, unseen, strict=True))
    assert right <= 3


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_nano", ROOT / "scripts" / "train_nano.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_training_script_makes_the_same_bytes_twice_and_overwrites_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "model"
    call = ["train_nano.py", "--out", str(out), "--steps", "2"]
    try:
        monkeypatch.setattr(sys, "argv", call)
        script().main()
        first = {file.name: file.read_bytes() for file in out.iterdir()}
        with pytest.raises(SystemExit):
            script().main()
        monkeypatch.setattr(sys, "argv", [*call, "--overwrite"])
        script().main()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert first == {file.name: file.read_bytes() for file in out.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert first["tokenizer.json"] == (model_path() / "tokenizer.json").read_bytes()
