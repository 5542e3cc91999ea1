"""Every shape of conversation becomes the same value, and what is wrong with one is said by row and message."""

import json

import pytest

from lowrank.data.dataset import read_dataset
from lowrank.data.rows import RowError
from lowrank.data.settings import DataSettings
from lowrank.data.shapes.tools import read_calls, read_tools
from lowrank.errors import DataError


def read(tmp_path, *rows, **settings):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_dataset(path, DataSettings(**settings))


def messages(tmp_path, row, **settings):
    data = read(tmp_path, row, **settings)
    assert data.kind == "chat"
    return [dict(message.fields) for message in data.rows[0].chat.messages]


S, U, A = ({"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a")))
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [S, U, A]},
        {"conversations": [S, U, A]},
        {"messages": SHAREGPT},
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": "s"},
        {"prompt": [S, U], "completion": [A]},
        {"prompt": [S, U], "completion": "a"},
        {"instruction": "u", "output": "a", "system": "s", "input": "", "history": None},
        {"messages": [S, {"role": "user", "content": [{"type": "text", "text": "u"}]}, A], "text": "t"},
        {"messages": [{"role": "system", "content": ""}, S, U, A]},
    ],
)
def test_one_conversation_by_many_names(tmp_path, row):
    assert messages(tmp_path, row) == [S, U, A]


def test_alpaca_with_input_history_and_columns_of_other_names(tmp_path):
    row = {"ask": "u", "context": "i", "say": "a", "history": [["q", "b"]]}
    found = messages(tmp_path, row, columns={"instruction": "ask", "input": "context", "output": "say"})
    assert [(m["role"], m["content"]) for m in found] == [
        ("user", "q"),
        ("assistant", "b"),
        ("user", "u\n\ni"),
        ("assistant", "a"),
    ]
    for role, says in (("prompt", "has a flag of its own"), ("promt", "is none of")):
        with pytest.raises(ValueError, match=says):
            DataSettings(columns={role: "x"})


@pytest.mark.parametrize(
    ("turn", "calls"),
    [
        (
            {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"x": [1]}'}}], "content": None},
            [{"id": "c", **CALL}],
        ),
        ({"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": [1]}})}, [CALL]),
        ({"from": "function_call", "value": json.dumps([CALL, CALL])}, [CALL, CALL]),
        ({"tool_calls": json.dumps([CALL])}, [CALL]),
        ({"function_call": {"name": "f", "arguments": '{"x": [1]}'}}, [CALL]),
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), json.dumps([TOOL["function"]])])
def test_tools_and_calls_of_them(tmp_path, turn, calls, tools):
    answer = {"role": "tool", "content": "", "name": "f", "tool_call_id": "c"}
    turn = turn if "from" in turn else {"role": "assistant", **turn}
    chat = read(tmp_path, {"messages": [U, turn, answer, A], "tools": tools}).rows[0].chat
    assert dict(chat.messages[1].fields) == {"role": "assistant", "content": "", "tool_calls": calls}
    assert chat.messages[2].fields == answer
    assert list(chat.tools) == [TOOL]
    assert all(read(tmp_path, {"messages": [U, A], "tools": none}).rows[0].chat.tools == () for none in ("", "[]", []))


def test_reasoning_by_its_three_names(tmp_path):
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert messages(tmp_path, {"messages": [U, {**A, name: "hm"}]})[1] == {**A, "reasoning_content": "hm"}


def test_what_a_row_says_of_its_training(tmp_path):
    marks = [{"train": False}, {"weight": 0}, {"weight": 1}, {"train": True}, {}]
    chat = read(tmp_path, {"messages": [turn for mark in marks for turn in (U, {**A, **mark})]}).rows[0].chat
    assert [m.trained for m in chat.messages[1::2]] == [False, False, True, True, None]
    assert read(tmp_path, {"prompt": [S, U], "completion": [A]}).rows[0].chat.given == 2


FAULTS = [
    ({"messages": "hello"}, "'messages' must be a list of messages, not str ('hello')"),
    ({"messages": []}, "'messages' is empty"),
    ({"messages": ["hello"]}, "'messages'[0] must be an object with role and content"),
    ({"messages": [{"role": "usr", "content": "u"}, A]}, "[0] is said by 'usr', which is none of system, developer"),
    ({"messages": [{"content": "u"}, A]}, "[0] is said by None"),
    ({"messages": [{"role": "user", "content": " "}, A]}, "[0] is empty"),
    ({"messages": [{"role": "user", "content": 3}, A]}, "[0]: the content must be text, not int (3)"),
    ({"messages": [U, {"role": "assistant", "content": ""}]}, "[1] is an empty answer"),
    ({"messages": [U]}, "no assistant turn"),
    ({"messages": [U, {"role": "tool", "content": "x"}, A]}, "message 1 is a tool's answer, and no call"),
    ({"messages": [U, {"role": "assistant", "tool_calls": "{"}]}, "[1]: tool_calls is not JSON: '{'"),
    ({"messages": [U, {"role": "assistant", "tool_calls": [1]}]}, "[1]: tool_calls holds no call of a tool"),
    ({"messages": [U, A], "tools": "{"}, "'tools' is not JSON"),
    ({"messages": [U, A], "tools": [1]}, "'tools' must be a list of tools"),
    ({"messages": [U, {**A, "weight": 0.5}]}, "weight 0 or 1, not 0.5"),
    ({"messages": [U, {**A, "thinking": [1]}]}, "[1]: the reasoning must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]}, "[0] holds a part of image_url"),
    ({"conversations": [{"from": "function_call", "value": "no"}]}, "'conversations'[0] is not JSON"),
    ({"conversations": [{"from": "human", "value": None}, A]}, "'conversations'[0] is empty"),
    ({"prompt": [U], "completion": 3}, "'completion' must be a list of messages, not int (3)"),
    ({"instruction": "u", "output": ""}, "'output' is empty"),
    ({"instruction": "u", "output": "a", "history": [["x"]]}, "'history' must be a list of [asked, answered]"),
    ({"instruction": "u", "output": "a", "input": 3}, "'input' must be text, not int (3)"),
]


@pytest.mark.parametrize(("row", "part"), FAULTS)
def test_faults_name_row_message_and_remedy(tmp_path, row, part):
    with pytest.raises(DataError) as raised:
        read(tmp_path, {"messages": [U, A]}, row)
    assert all(word in str(raised.value) for word in ("d.jsonl:2", "--bad-rows skip", part)), str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "kind", "fields"),
    [
        ({"sentence": "a", "label": 1}, "classification", {"text": "a", "label": "1"}),
        (
            {"sentence1": "a", "sentence2": "b", "label": 1},
            "classification",
            {"text": "a", "text_pair": "b", "label": "1"},
        ),
        (
            {"premise": "a", "hypothesis": "b", "label": 3.5},
            "regression",
            {"text": "a", "text_pair": "b", "label": "3.5"},
        ),
        ({"prompt": "a", "response": "b"}, "completion", {"prompt": "a", "completion": "b"}),
        ({"instruction": "u", "context": "", "response": "a"}, "chat", None),
        ({"conversation": SHAREGPT}, "chat", None),
    ],
)
def test_columns_that_well_known_sets_call_otherwise(tmp_path, row, kind, fields):
    data = read(tmp_path, row)
    assert data.kind == kind
    assert data.unused == ()
    if fields is not None:
        assert data.rows[0].fields == fields


def test_a_column_that_is_named_by_the_user_beats_what_it_is_usually_called(tmp_path):
    row = {"sentence": "a", "sentence1": "b", "label": 1}
    assert read(tmp_path, row, text_column="sentence1").rows[0].fields["text"] == "b"
    assert read(tmp_path, {**row, "text": "c"}).rows[0].fields["text"] == "c"


def test_bytes_of_a_table_are_no_arguments_of_a_call():
    """A template would print them as Python does, b'...'."""
    with pytest.raises(RowError, match=r"^call: arguments must be values of JSON"):
        read_calls({"name": "f", "arguments": {"x": b"1"}}, "call")
    with pytest.raises(RowError, match=r"^tools must be values of JSON"):
        read_tools([{"name": "f", "parameters": {"x": b"1"}}], "tools")
