"""What of a conversation is trained: what the assistant says and the token that ends it, whatever the template."""

import json
import os
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import FAMILIES, HEADERS, MARKED, OPENED, TRIMMED, byte_tokenizer
from lowrank.data.chat.offsets import trained_tokens
from lowrank.data.dataset import Dataset
from lowrank.data.recipe import Recipe, make_recipe, read_recipe
from lowrank.data.rows import Conversation, Message, Row
from lowrank.data.settings import DataSettings
from lowrank.data.tokens import IGNORED, encode, prompt_ids
from lowrank.errors import ConfigError, DataError, LowrankWarning

TOKENIZERS = {name: byte_tokenizer(template) for name, (template, _, _) in FAMILIES.items()}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def chat(*turns, **more):
    """("user", "hi"), or (role, text, fields of the message)."""
    messages = []
    for role, text, *extra in turns:
        fields = dict(extra[0]) if extra else {}
        trained = fields.pop("trained", None)
        messages.append(Message({"role": role, "content": text, **fields}, trained))
    return Conversation(tuple(messages), **more)


def encoded(tokenizer, *chats, longest=10**6, bad_rows="error", **said):
    data = Dataset("d.jsonl", "chat", [Row(n + 1, chat=c) for n, c in enumerate(chats)], bad_rows=bad_rows)
    return encode(data, tokenizer, make_recipe(DataSettings(**said), "chat", tokenizer, longest, ()))


def trained(tokenizer, example):
    """The trained stretches of a row, as text."""
    runs = groupby(zip(example.ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in run]) for on, run in runs if on]


def all_trained(tokenizer, *chats, **said):
    return [text for example in encoded(tokenizer, *chats, **said).examples for text in trained(tokenizer, example)]


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<[|"), min_size=1).filter(str.strip)
EXCHANGES = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@pytest.mark.parametrize("name", FAMILIES)
@given(exchanges=EXCHANGES, system=st.none() | TEXT)
@settings(max_examples=25, deadline=None)
def test_trained_is_what_the_assistant_says_and_its_end(name, exchanges, system):
    tokenizer, (_, begin, end) = TOKENIZERS[name], FAMILIES[name]
    turns = [("system", system)] if system else []
    turns += [turn for asked, said in exchanges for turn in (("user", asked), ("assistant", said))]
    answers = [said.strip() if name in TRIMMED else said for _, said in exchanges]
    assert all_trained(tokenizer, chat(*turns)) == [begin + said + end for said in answers]
    assert all_trained(tokenizer, chat(*turns), train_on="last") == [begin + answers[-1] + end]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_what_serving_sees(name):
    """What stands before an answer is what a server gives the model at that turn, but where that opens a thought."""
    tokenizer = TOKENIZERS[name]
    turns = [("user", "a b"), ("assistant", "c d"), ("user", "e"), ("assistant", "f")]
    for upto in (1, 3):
        last = encoded(tokenizer, chat(*turns[: upto + 1]), train_on="last").examples[0]
        start = next(i for i, label in enumerate(last.labels) if label != IGNORED)
        messages = [{"role": role, "content": text} for role, text in turns[:upto]]
        served = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before = tokenizer.decode(last.ids[:start])
        own = {"opened": "<think>\n"}.get(name, "")
        assert before.removesuffix("<think>\n\n</think>\n\n") == served.removesuffix(own)


def test_rewritten_history_makes_a_row_of_each_answer():
    turns = [("user", "a"), ("assistant", "b", {"reasoning_content": "hm"}), ("user", "c"), ("assistant", "d")]
    for name, count in (("thinking", 2), ("channels", 2), ("headers", 1)):
        data = encoded(TOKENIZERS[name], chat(*turns))
        assert (len(data.examples), data.rewritten) == (count, int(count > 1))
    first, second = encoded(TOKENIZERS["thinking"], chat(*turns)).examples
    assert trained(TOKENIZERS["thinking"], first) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert "hm" not in TOKENIZERS["thinking"].decode(second.ids)


def test_thoughts_and_calls_are_trained_and_tool_answers_are_not():
    turns = [
        ("user", "a"),
        ("assistant", "", {"reasoning_content": "hm", "tool_calls": [CALL]}),
        ("tool", "42"),
        ("assistant", "it is 42"),
    ]
    tokenizer = TOKENIZERS["thinking"]
    data = encoded(tokenizer, chat(*turns))
    assert len(data.examples) == 1
    called = '<think>\nhm\n</think>\n\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>'
    assert trained(tokenizer, data.examples[0]) == [called, "it is 42<|im_end|>"]


def test_thoughts_in_a_channel_are_trained_where_they_are_written():
    turns = [
        ("user", "a"),
        ("assistant", "b", {"thinking": "hm"}),
        ("user", "c"),
        ("assistant", "d", {"thinking": "oh"}),
    ]
    tokenizer = TOKENIZERS["channels"]
    thought, between = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
    written = [thought + "hm" + between + "b<|return|>", thought + "oh" + between + "d<|return|>"]
    assert all_trained(tokenizer, chat(*turns)) == written
    assert "hm" not in tokenizer.decode(encoded(tokenizer, chat(*turns)).examples[1].ids)


def test_an_empty_thought_is_trained_only_where_the_row_has_it():
    tokenizer = TOKENIZERS["thinking"]
    (example,) = encoded(tokenizer, chat(("user", "a"), ("assistant", "b"))).examples
    assert "assistant\n<think>\n\n</think>\n\nb" in tokenizer.decode(example.ids)
    assert trained(tokenizer, example) == ["b<|im_end|>"]
    written = byte_tokenizer(MARKED)
    said = "<think>\n\n</think>\n\nb"
    assert all_trained(written, chat(("user", "a"), ("assistant", said))) == [said + "<|im_end|>"]


TURNS = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
OPEN = "<|header|>assistant\n\n"


@pytest.mark.parametrize(
    ("said", "turns", "given", "expected"),
    [
        ({}, TURNS, 0, ["b<|eot|>", "d<|eot|>"]),
        ({"train_on": "last"}, TURNS, 0, ["d<|eot|>"]),
        ({"train_on": "completion"}, TURNS, 0, ["d<|eot|>"]),
        ({"train_on": "completion"}, TURNS, 2, ["b<|eot|>", "d<|eot|>"]),
        ({}, TURNS, 3, ["d<|eot|>"]),
        ({}, [*TURNS, ("user", "e")], 0, ["b<|eot|>", "d<|eot|>"]),
        ({}, [*TURNS[:4], ("assistant", "d", {"trained": False})], 0, ["b<|eot|>"]),
        (
            {"train_on": "last"},
            [*TURNS[:2], ("assistant", "b", {"trained": True}), *TURNS[3:]],
            0,
            ["b<|eot|>", "d<|eot|>"],
        ),
        ({}, [TURNS[0], ("user", "a", {"trained": True}), *TURNS[2:3]], 0, ["<|header|>user\n\na<|eot|>", "b<|eot|>"]),
        ({}, [("assistant", "hi"), *TURNS[1:3]], 0, ["hi<|eot|>", "b<|eot|>"]),
    ],
)
def test_what_is_trained_can_be_chosen(said, turns, given, expected):
    assert all_trained(byte_tokenizer(HEADERS), chat(*turns, given=given), **said) == expected


def test_all_is_all_but_the_first_token():
    (example,) = encoded(byte_tokenizer(HEADERS), chat(*TURNS), train_on="all").examples
    assert example.labels == [IGNORED, *example.ids[1:]]


def test_a_tokenizer_without_template_gets_the_plain_one():
    tokenizer = byte_tokenizer()
    recipe = make_recipe(DataSettings(), "chat", tokenizer, 512, ())
    assert recipe.template_of == "the plain one of lowrank"
    turns = [
        *TURNS[:2],
        ("assistant", "", {"reasoning_content": "hm", "tool_calls": [CALL]}),
        ("tool", ""),
        *TURNS[2:3],
    ]
    tools = ({"type": "function", "function": {"name": "f"}},)
    call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    assert all_trained(tokenizer, chat(*turns, tools=tools)) == [f"<think>\nhm\n</think>\n{call}</s>", "b</s>"]


BROKEN = MARKED.replace(
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
)
FAULTS = [
    (BROKEN, TURNS, {}, "d.jsonl:1: message 2: the template's {% generation %} does not mark"),
    (
        FAMILIES["alternating"][0],
        [*TURNS[:2], *TURNS[1:3]],
        {},
        "d.jsonl:1: the chat template refuses it (turns must alternate)",
    ),
    ("{{ messages[0].content / 0 }}", TURNS, {}, "d.jsonl:1: the chat template refuses it"),
    ("{% if", TURNS, {}, "d.jsonl:1: the chat template refuses it"),
    ("{{ 'x' * 9223372036854775000 }}", TURNS, {}, "d.jsonl:1: the chat template refuses it (MemoryError)"),
    (HEADERS.replace("+ '<|eot|>'", "+ '\n'"), TURNS, {}, "no special token after an answer"),
    (
        "{% for m in messages %}{{ m.content if m.role != 'assistant' else '' }}{% endfor %}",
        TURNS,
        {},
        "leaves nothing",
    ),
    (
        "{% for m in messages[1:] %}{{ m.content + '</s>' }}{% endfor %}",
        TURNS[1:3],
        {},
        "all of its tokens are trained",
    ),
]


@pytest.mark.parametrize(("template", "turns", "said", "part"), FAULTS)
def test_what_would_be_a_wrong_mask_is_an_error(template, turns, said, part):
    with pytest.raises(DataError) as raised:
        encoded(byte_tokenizer(template), chat(*turns), **said)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_that_cannot_be_written_can_be_left_out():
    bad = chat(("user", "a"), ("user", "b"), ("assistant", "c"))
    with pytest.warns(LowrankWarning, match=r"1 bad rows are left out: d\.jsonl:1: the chat template refuses"):
        data = encoded(TOKENIZERS["alternating"], bad, chat(*TURNS), bad_rows="skip")
    assert len(data.examples) == 1


def test_too_long_chats_lose_their_oldest_turns_then_the_beginning_of_the_prompt():
    tokenizer = byte_tokenizer(HEADERS)
    whole = len(encoded(tokenizer, chat(*TURNS)).examples[0].ids)
    data = encoded(tokenizer, chat(*TURNS), longest=whole - 1)
    assert data.cut == 1
    assert list(data.examples) == list(encoded(tokenizer, chat(TURNS[0], *TURNS[3:])).examples)
    short = len(data.examples[0].ids) - 5
    (example,) = encoded(tokenizer, chat(*TURNS), longest=short).examples
    assert len(example.ids) == short
    assert example.ids[0] == tokenizer.bos_token_id
    assert trained(tokenizer, example) == ["d<|eot|>"]
    for policy in ("drop", "cut"):
        data = encoded(
            tokenizer, chat(*TURNS), chat(("user", "x"), ("assistant", "y")), longest=whole - 1, too_long=policy
        )
        assert (data.cut, data.dropped) == {"drop": (0, 1), "cut": (1, 0)}[policy]
    with pytest.raises(DataError, match=r"1 rows are longer than 20 tokens \(d\.jsonl:1\)"):
        encoded(tokenizer, chat(*TURNS), longest=20, too_long="error")
    with pytest.raises(ConfigError, match="split is for rows of text"):
        encoded(tokenizer, chat(*TURNS), too_long="split")
    with pytest.raises(DataError, match="no row has a token to train within 2 tokens"):
        encoded(tokenizer, chat(*TURNS), longest=2)


@pytest.mark.parametrize("greeting", [[("assistant", "hello")], [("system", "be"), ("assistant", "hello")]])
def test_a_greeting_before_the_first_question_stays_what_is_trained(greeting):
    tokenizer = byte_tokenizer(HEADERS)
    turns = [("user", "old"), ("assistant", "gone"), ("user", "new"), ("assistant", "kept")]
    whole = len(encoded(tokenizer, chat(*greeting, *turns)).examples[0].ids)
    (example,) = encoded(tokenizer, chat(*greeting, *turns), longest=whole - 1).examples
    assert trained(tokenizer, example) == ["hello<|eot|>", "kept<|eot|>"]


def test_the_question_asked_is_the_question_trained():
    for name in ("headers", "thinking", "instructed", "channels"):
        tokenizer = TOKENIZERS[name]
        recipe = make_recipe(DataSettings(), "chat", tokenizer, 512, ())
        (example,) = encoded(tokenizer, chat(("user", "a b"), ("assistant", "c"))).examples
        asked = prompt_ids(tokenizer, recipe, "a b")
        assert example.ids[: len(asked)] == asked


def test_the_recipe_keeps_the_template_and_notices_another(tmp_path):
    tokenizer = byte_tokenizer(HEADERS)
    recipe = make_recipe(DataSettings(train_on="last", too_long="drop"), "chat", tokenizer, 512, ())
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe.as_json()}))
    assert read_recipe(tmp_path) == recipe
    other = byte_tokenizer(MARKED)
    with pytest.warns(LowrankWarning, match="is not the one the adapter was trained with"):
        again = make_recipe(DataSettings(), "chat", other, 512, (), recipe)
    assert again.chat_template == HEADERS
    (tmp_path / "mine.jinja").write_text(OPENED)
    mine = make_recipe(DataSettings(chat_template=str(tmp_path / "mine.jinja")), "chat", other, 512, (), recipe)
    assert mine.chat_template == OPENED
    with pytest.raises(ConfigError, match=r"--chat-template none\.jinja: No such file"):
        make_recipe(DataSettings(chat_template="none.jinja"), "chat", other, 512, ())
    os.mkfifo(tmp_path / "pipe.jinja")
    with pytest.raises(ConfigError, match=r"--chat-template: .*pipe\.jinja is no regular file but a pipe"):
        make_recipe(DataSettings(chat_template=str(tmp_path / "pipe.jinja")), "chat", other, 512, ())
    with pytest.raises(ConfigError, match="--train-on last: of rows of kind text one trains all"):
        make_recipe(DataSettings(train_on="last"), "text", other, 512, ())


def test_tokens_without_characters_go_with_what_follows():
    offsets = [(0, 2), (2, 2), (3, 5), (5, 6), (5, 6), (6, 8)]  # a trimmed blank at 2; two tokens of one character
    assert trained_tokens(offsets, [(2, 6)]) == [False, True, True, True, True, False]
    assert trained_tokens(offsets, [(3, 5)]) == [False, False, True, False, False, False]
    assert trained_tokens(offsets, []) == [False] * 6


def test_a_tokenizer_without_offsets_is_asked_for_the_pieces():
    class Slow:
        """The same tokens, and no offsets."""

        is_fast = False

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text, **how):
            assert "return_offsets_mapping" not in how
            return self.inner(text, **how)

    fast = byte_tokenizer(HEADERS)
    found, wanted = (encoded(one, chat(*TURNS)).examples for one in (Slow(fast), fast))
    assert list(found) == list(wanted)


def test_texts_are_split_and_prompts_cut_from_the_left():
    tokenizer = byte_tokenizer()
    text = Dataset("d", "text", [Row(1, {"text": "abcdefghij"})])
    data = encode(text, tokenizer, Recipe("text", "", 5))
    assert data.split == 1
    said = [token for example in data.examples for token in example.labels[1:]]
    assert said == tokenizer("bcdefghij</s>")["input_ids"]
    assert all(len(e.ids) <= 5 and e.labels[0] == IGNORED for e in data.examples)
    assert len(encode(text, tokenizer, Recipe("text", "", 5, too_long="cut")).examples[0].ids) == 5
    row = Dataset("d", "completion", [Row(1, {"prompt": "abcdef", "completion": "xy"})])
    (example,) = encode(row, tokenizer, Recipe("completion", "{prompt}", 5)).examples
    assert tokenizer.decode(example.ids) == "efxy</s>"
    assert trained(tokenizer, example) == ["xy</s>"]
    with pytest.raises(DataError, match="no row has a token to train within 3 tokens"):
        encode(row, tokenizer, Recipe("completion", "{prompt}", 3))  # nothing would stand before the answer
    everything = encode(row, tokenizer, replace(Recipe("completion", "{prompt}", 50), train_on="all")).examples[0]
    assert trained(tokenizer, everything) == ["bcdefxy</s>"]
