"""What people bring that is not as it should be: one sentence each, or the right rows, and never a traceback."""

from itertools import pairwise

import pyarrow
import pytest
from pyarrow import parquet

from chat_templates import ALTERNATING, HEADERS, byte_tokenizer
from lowrank.data.dataset import label_names, read_dataset
from lowrank.data.recipe import make_recipe
from lowrank.data.settings import DataSettings
from lowrank.data.tokens import IGNORED, encode
from lowrank.errors import DataError, LowrankWarning
from lowrank.train.recipes import labels_of
from train_models import write_jsonl

U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
CHAT = {"messages": [U, A]}


def read(path, **said):
    return read_dataset(path, DataSettings(cache=False, **said))


def tokens(data, tokenizer, **said):
    settings = DataSettings(**said)
    return encode(data, tokenizer, make_recipe(settings, data.kind, tokenizer, 512, (), speaks=data.speaks))


@pytest.mark.parametrize(
    "turns",
    [[U, U, A], [A, U, A], [U, A, A], [U, S, A], [S, A, U, A], [U, A, U]],
    ids=lambda turns: "".join(t["role"][0] for t in turns),
)
def test_roles_out_of_order_are_for_the_template_to_judge(tmp_path, turns):
    """Where it writes them, each answer is trained and nothing else; where it refuses, its own words are told."""
    data = read(write_jsonl(tmp_path / "d.jsonl", [{"messages": turns}]))
    tokenizer = byte_tokenizer(HEADERS)
    (example,) = tokens(data, tokenizer).examples
    said = tokenizer.decode([token for token in example.labels if token != IGNORED])
    assert said == "a<|eot|>" * turns.count(A)
    roles = [turn["role"] for turn in turns if turn is not S]
    if any(one == other for one, other in pairwise(roles)) or roles[0] != "user" or S in turns[1:]:
        with pytest.raises(DataError, match=r"d\.jsonl:1: the chat template refuses it \(turns must alternate\)"):
            tokens(data, byte_tokenizer(ALTERNATING))


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.txt", "d.parquet", "d.arrow", "d.jsonl.gz", "d.csv.zst"]
)
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n"])
def test_a_file_without_a_byte_or_with_a_mark_alone(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(tmp_path / name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_nulls_in_nested_columns_are_what_is_not_there(tmp_path):
    """A table has every key in every message: what no message says is null, at any depth."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "train": None, "reasoning_content": None}
    result = {"role": "tool", "content": "", "tool_calls": None, "train": None, "reasoning_content": None}
    turns = [
        {**U, "tool_calls": None, "train": None, "reasoning_content": None},
        answer,
        result,
        {**A, "tool_calls": []},
    ]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns, "tools": None}]), tmp_path / "d.parquet")
    (row,) = read(tmp_path / "d.parquet").rows
    assert [dict(message.fields) for message in row.chat.messages] == [
        U,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": ""},
        A,
    ]
    assert [message.trained for message in row.chat.messages] == [None] * 4
    nothing = write_jsonl(tmp_path / "d.jsonl", [CHAT, {"messages": [None, A]}, {"messages": None}])
    with pytest.raises(
        DataError, match=r"d\.jsonl:2: field 'messages'\[0\] must be an object.*; .*d\.jsonl:3: field 'messages' must"
    ):
        read(nothing)


def test_numbers_as_text_are_numbers_as_labels_and_no_texts(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\na,3.5\nb,-1e-3\nc,4\n")
    data = read(tmp_path / "d.csv")
    assert (data.kind, [row.fields["label"] for row in data.rows]) == ("regression", ["3.5", "-1e-3", "4"])
    rows = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "completion": 42}])
    with pytest.raises(DataError, match=r"field 'completion' must be text, not int \(42\)"):
        read(rows)
    (tmp_path / "d.csv").write_text("text,label\na,3.5\nb,good\n")
    with pytest.raises(DataError, match=r"rows of different kinds|must be a number, not 'good'"):
        read(tmp_path / "d.csv")


def test_labels_that_nearly_every_row_has_for_itself_are_said(tmp_path):
    """Forty thousand classes are read in seconds, and are hardly meant."""
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"t{i},{i}\n" for i in range(40_000)))
    data = read(tmp_path / "d.csv")
    with pytest.warns(LowrankWarning, match="40,000 labels in 40,000 rows: .* --kind regression"):
        labels = labels_of(tmp_path_of_no_classifier(tmp_path), data)
    assert labels == tuple(map(str, range(40_000)))
    write_jsonl(tmp_path / "few.jsonl", [{"text": str(i), "label": i % 9} for i in range(100)])
    assert len(label_names(read(tmp_path / "few.jsonl"))) == 9


def tmp_path_of_no_classifier(folder):
    (folder / "config.json").write_text("{}")
    return folder


def test_a_parquet_without_the_column_says_which_it_has(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["a"], "mark": [1]}), tmp_path / "d.parquet")
    with pytest.raises(
        DataError, match=r"d\.parquet: there is no column 'text' for --text-column; it has 'body', 'mark'"
    ):
        read(tmp_path / "d.parquet", text_column="text")
    with pytest.raises(DataError, match=r"d\.parquet:1: none of messages.* among its fields \('body', 'mark'\)"):
        read(tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet", text_column="body", label_column="mark").kind == "classification"


def test_a_folder_of_files_with_different_shapes_names_one_of_each(tmp_path):
    write_jsonl(tmp_path / "train-a.jsonl", [CHAT])
    write_jsonl(
        tmp_path / "train-b.jsonl",
        [{"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}],
    )
    assert len(read(tmp_path).rows) == 2  # both are conversations
    write_jsonl(tmp_path / "train-c.jsonl", [{"text": "t"}])
    with pytest.raises(
        DataError, match=r"rows of different kinds: .*train-a\.jsonl:1 is messages \(chat\), .*train-c\.jsonl:1 is text"
    ):
        read(tmp_path)
    assert len(read(tmp_path, kind="chat", bad_rows="skip").rows) == 2


class WithoutOffsets:
    """A tokenizer of which a piece alone becomes other tokens than in its place; it does not say where they stand."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, **how):
        assert "return_offsets_mapping" not in how
        return {"input_ids": [0, *self.inner(text, **how)["input_ids"]]}


def test_a_tokenizer_without_offsets_that_cannot_be_asked_by_pieces_is_said(tmp_path):
    data = read(write_jsonl(tmp_path / "d.jsonl", [CHAT]))
    with pytest.raises(DataError, match="does not say where its tokens stand, and the turns alone become other tokens"):
        tokens(data, WithoutOffsets(byte_tokenizer(HEADERS)))
