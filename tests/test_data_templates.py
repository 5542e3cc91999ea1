"""Which chat template holds, of several, and what day it writes: the same in training, in the cache and when asked."""

import json
from pathlib import Path

import pytest
import yaml

from chat_models import save_chain
from chat_templates import HEADERS, MARKED, byte_tokenizer
from lowrank import train
from lowrank.data.cache.keys import tokens_key
from lowrank.data.chat.dates import dated, writes_date
from lowrank.data.chat.template import ChatTemplate, template_text
from lowrank.data.dataset import Dataset
from lowrank.data.recipe import make_recipe
from lowrank.data.rows import Conversation, Message, Row
from lowrank.data.settings import DataSettings
from lowrank.data.tokens import IGNORED, encode
from lowrank.errors import ConfigError, LowrankWarning
from lowrank.train.generation import open_writer
from lowrank.train.reporting import Reporter
from lowrank.train.settings import EvalSettings, GenerateSettings, TrainSettings
from train_models import tokenizer as words

# the traits of templates that say what day it is
DATED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = 'no' %}{% endif %}"
    "{{ bos_token + 'Today: ' + day + strftime_now( \"%H:%M\" ) }}" + HEADERS.replace("{{ bos_token }}", "")
)
COMPUTED = "{% set how = '%Y' %}{{ strftime_now(how) }}" + HEADERS
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOOLS = ({"type": "function", "function": {"name": "f"}},)


def recipe_of(tokenizer, **said):
    return make_recipe(DataSettings(**said), "chat", tokenizer, 512, ())


def test_a_date_is_that_of_the_run(monkeypatch):
    tokenizer = byte_tokenizer(DATED)
    recipe = recipe_of(tokenizer, chat_date="2024-02-29")
    text = ChatTemplate(recipe.dated_template, tokenizer).render(TURNS, ())
    assert text.startswith("<s>Today: 29 Feb 202400:00<|header|>user\n\na")
    assert (recipe.date, recipe.chat_template) == ("2024-02-29", DATED)
    today = recipe_of(tokenizer)
    assert today.date > "2026"
    again = make_recipe(DataSettings(), "chat", tokenizer, 512, (), recipe)
    assert again.date == "2024-02-29"
    other = make_recipe(DataSettings(chat_date="2025-01-01"), "chat", tokenizer, 512, (), recipe)
    assert other.date == "2025-01-01"
    assert tokens_key("k", tokenizer, recipe) != tokens_key("k", tokenizer, other)
    assert recipe_of(byte_tokenizer(HEADERS), chat_date="2024-02-29").date == ""


def test_a_format_that_is_computed_is_left_and_said():
    assert writes_date(dated(COMPUTED, "2024-02-29"))
    assert not writes_date(dated(DATED, "2024-02-29"))
    assert not writes_date(HEADERS)
    assert dated("{{ strftime_now('it''s') }}", "") == "{{ strftime_now('it''s') }}"


@pytest.mark.parametrize("day", ["2024-02-30", "today", "29.2.2024", "20240229"])
def test_a_day_that_is_none_is_said(day):
    with pytest.raises(ValueError, match="must be a day as in 2026-11-30"):
        DataSettings(chat_date=day)


def test_yaml_may_say_a_day_without_quotes():
    assert DataSettings(**yaml.safe_load("chat_date: 2024-02-29")).chat_date == "2024-02-29"


def test_a_run_says_its_date_and_is_asked_by_it(tmp_path, monkeypatch):
    model = str(save_chain(tmp_path / "model", DATED, "\nhi<|eot|>!"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"messages": [TURNS[0], {**TURNS[1], "content": f"b{i}"}]}) + "\n" for i in range(4))
    )
    said = []
    reporter = Reporter()
    monkeypatch.setattr(reporter, "started", lambda summary, _steps: said.append(dict(summary)["template"]))
    out = tmp_path / "run"
    asked = TrainSettings(
        model=model, data=str(rows), out=str(out), steps=1, batch_size=2, chat_date="2024-02-29", device="cpu"
    )
    train.run(asked, reporter)
    assert said[0].endswith("; it writes a date, 2024-02-29 in this run")
    assert yaml.safe_load((out / "train.yaml").read_text())["chat_date"] == "2024-02-29"
    writer = open_writer(GenerateSettings(model=model, adapter=str(out), chat=True, device="cpu"))
    assert "29 Feb 2024" in writer.loaded.tokenizer.decode(writer.ids([TURNS[0]]))
    seen = []
    monkeypatch.setattr(
        "lowrank.train.evaluator.encode", lambda data, tok, recipe: seen.append(recipe) or encode(data, tok, recipe)
    )
    train.evaluate(EvalSettings(model=model, adapter=str(out), data=str(rows), device="cpu"))
    assert seen[0].date == "2024-02-29"


def test_several_templates_are_taken_as_a_server_takes_them():
    """Text by text what transformers renders, lines at their ends and beginnings included."""
    default, tools = HEADERS + "\n", "\n{% if tools %}tools{% endif %}\n  " + MARKED + "\n"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": default, "tool_use": tools, "rag": "x"}
    text, whose = template_text(tokenizer, None)
    assert whose == "the tokenizer's own 'default' and, with tools, 'tool_use'"
    for given in ((), TOOLS):
        for generate in (False, True):
            served = tokenizer.apply_chat_template(
                TURNS, tools=list(given) or None, tokenize=False, add_generation_prompt=generate
            )
            assert ChatTemplate(text, tokenizer).render(TURNS, given, generate) == served
    assert template_text(tokenizer, "rag") == ("x", "the tokenizer's own 'rag'")
    with pytest.raises(
        ConfigError, match="No such file or directory; the tokenizer's own are called 'default', 'tool_use', 'rag'"
    ):
        template_text(tokenizer, "rga")
    tokenizer.chat_template = {"default": default, "rag": "x"}
    assert template_text(tokenizer, None) == (default, "the tokenizer's own 'default'")
    tokenizer.chat_template = {"chat": default, "rag": "x"}
    with pytest.raises(ConfigError, match="several chat templates, 'chat', 'rag', and none is called 'default'"):
        template_text(tokenizer, None)


def chats(tokenizer, *conversations):
    rows = [
        Row(n + 1, chat=Conversation(tuple(Message(fields) for fields in turns)))
        for n, turns in enumerate(conversations)
    ]
    return encode(Dataset(Path("d.jsonl"), "chat", rows), tokenizer, recipe_of(tokenizer))


def test_an_end_that_only_some_answers_have_is_warned_of():
    ended_by_a_word = HEADERS.replace("'<|eot|>'", "('<|eot|>' if 'b' in m.content or m.role == 'user' else '\n')")
    other = [TURNS[0], {"role": "assistant", "content": "c"}]
    with pytest.warns(LowrankWarning, match="1 of 2 answers stand in rows where the chat"):
        chats(byte_tokenizer(ended_by_a_word), TURNS, other)


def test_a_pad_token_that_is_the_end_token_is_trained_all_the_same():
    """Where labels are made from the pad token's number, as many trainers make them, no end is ever learned."""
    tokenizer = byte_tokenizer(HEADERS.replace("'<|eot|>'", "eos_token"))
    tokenizer.pad_token = tokenizer.eos_token
    (example,) = chats(tokenizer, TURNS).examples
    assert example.labels[-1] == tokenizer.eos_token_id != IGNORED
    tokenizer = words()
    tokenizer.pad_token = tokenizer.eos_token
    row = Dataset(Path("d"), "completion", [Row(1, {"prompt": "the cat", "completion": "is red"})])
    (example,) = encode(row, tokenizer, make_recipe(DataSettings(), "completion", tokenizer, 64, ())).examples
    assert example.labels[-1] == tokenizer.eos_token_id
