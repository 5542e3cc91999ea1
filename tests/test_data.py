"""Reading data files: rows named by file and line, and every mistake one clear sentence."""

import json

import pytest

from lowrank.data.dataset import label_names, read_dataset, split
from lowrank.data.settings import DataSettings
from lowrank.errors import DataError

COMPLETION = {"prompt_column": "mr", "completion_column": "ref"}


def read(tmp_path, name, content, **settings):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_dataset(path, DataSettings(**settings))


def fields(data):
    return [row.fields for row in data.rows]


def test_csv_rows_carry_the_line_they_start_at(tmp_path):
    data = read(tmp_path, "d.csv", 'mr,ref\n"a, b","one\ntwo"\n\nc,three\n', **COMPLETION)
    assert data.kind == "completion"
    assert [row.line for row in data.rows] == [2, 5]
    assert fields(data) == [
        {"prompt": "a, b", "completion": "one\ntwo"},
        {"prompt": "c", "completion": "three"},
    ]


def test_quotes_are_letters_in_tsv(tmp_path):
    data = read(tmp_path, "d.tsv", 'sentence\tlabel\n"open quote\t1\nplain "x"\t0\n', text_column="sentence")
    assert data.kind == "classification"
    assert fields(data) == [{"text": '"open quote', "label": "1"}, {"text": 'plain "x"', "label": "0"}]


def test_columns_without_a_header_have_numbers(tmp_path):
    data = read(tmp_path, "d.tsv", "gj\t1\t\tone\r\ngj\t0\t*\ttwo\r\n", header=False, text_column="4", label_column="2")
    assert fields(data) == [{"text": "one", "label": "1"}, {"text": "two", "label": "0"}]


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert fields(read(tmp_path, "d.csv", "\ufefftext\nhello\n")) == [{"text": "hello"}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "p", "completion": "c"}, "completion"),
        ({"text": "t"}, "text"),
        ({"text": "t", "label": "good"}, "classification"),
        ({"text": "t", "text_pair": "u", "label": 1}, "classification"),
    ],
)
def test_kind_is_seen_from_the_fields(tmp_path, row, kind):
    assert read(tmp_path, "d.jsonl", json.dumps(row) + "\n").kind == kind


def test_kind_can_be_chosen(tmp_path):
    line = json.dumps({"text": "t", "label": "good", "prompt": "p", "completion": "c"})
    assert read(tmp_path, "d.jsonl", line, kind="text").kind == "text"
    assert read(tmp_path, "d.jsonl", line, kind="completion").kind == "completion"


def test_null_is_a_missing_field(tmp_path):
    with pytest.raises(DataError, match=r"d\.jsonl:2: field 'completion' is missing"):
        read(tmp_path, "d.jsonl", '{"prompt": "p", "completion": "c"}\n{"prompt": "p", "completion": null}\n')


FAULTS = [
    ("d.csv", "", {}, ["d.csv", "no rows"]),
    ("d.csv", "text\n", {}, ["d.csv", "no rows"]),
    ("d.jsonl", "\n\n", {}, ["d.jsonl", "no rows"]),
    ("d.doc", "hello", {}, ["'.doc'", ".jsonl, .json, .csv, .tsv"]),
    ("d", "hello", {}, ["a file without an ending", ".jsonl, .json, .csv, .tsv"]),
    ("d.jsonl", '{"text": "a"}\n{"text": \n', {}, ["d.jsonl:2", "not JSON"]),
    ("d.jsonl", '["a"]\n', {}, ["d.jsonl:1", "JSON object", "list"]),
    ("d.jsonl", '{"text": "a"}\n', {"header": False}, ["no header line"]),
    (
        "d.jsonl",
        '{"text": "a"}\n{"text": "hello \\ud83d"}\n',
        {},
        ["d.jsonl:2", "'text' holds half a character", "mend"],
    ),
    ("d.jsonl", '{"text": "a", "more": [{"x": "\\uDC00"}]}\n', {}, ["d.jsonl:1", "'more' holds half a character"]),
    ("d.jsonl", '{"text": ' + "[" * 3000 + "]" * 3000 + "}\n", {}, ["d.jsonl:1", "nested more than 100 deep"]),
    ("d.jsonl", '{"text": ' + "[" * 150 + "]" * 150 + "}\n", {}, ["d.jsonl:1", "nested more than 100 deep"]),
    ("d.jsonl", '{"text": ' + "9" * 5000 + "}\n", {}, ["d.jsonl:1", "not JSON", "4300 digits"]),
    ("d.jsonl", b'{"text": "caf\xe9"}\n', {}, ["0xe9", "UTF-8"]),
    ("d.csv", 'mr,ref\na,"b\nc,d\n', COMPLETION, ["d.csv:2", "quote left open"]),
    ("d.csv", "mr,ref\na,b,c\n", COMPLETION, ["d.csv:2", "3 fields", "has 2"]),
    ("d.tsv", "mr\tref\na\n", COMPLETION, ["d.tsv:2", "1 fields", "has 2"]),
    ("d.csv", "mr,mr\na,b\n", {}, ["d.csv:1", "'mr' more than once", "--no-header"]),
    ("d.csv", "mr,ref\na,b\n", {"prompt_column": "MR"}, ["no column 'MR'", "--prompt-column", "'mr', 'ref'"]),
    ("d.jsonl", '{"a": "x"}\n{"b": "y"}\n', {"text_column": "c"}, ["no column 'c'", "'a', 'b'"]),
    ("d.csv", "mr,ref\na,b\n", {}, ["d.csv:2", "'mr', 'ref'", "--prompt-column", "--text-column"]),
    ("d.csv", "mr,ref\na,b\n,c\nd,\n", COMPLETION, ["d.csv:3: field 'mr' is empty", "d.csv:4: field 'ref' is empty"]),
    ("d.jsonl", '{"text": "a"}\n{"text": 3}\n', {}, ["d.jsonl:2", "'text' must be text, not int (3)"]),
    ("d.jsonl", '{"text": "a"}\n{"txt": "b"}\n', {}, ["d.jsonl:2", "'text' is missing", "--text-column"]),
    (
        "d.jsonl",
        '{"text": "a"}\n{"text": "b"}\n{"prompt": "a", "completion": "b"}\n',
        {},
        ["different kinds", "d.jsonl:1 is text", "d.jsonl:3 is prompt + completion"],
    ),
    (
        "d.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b"}\n',
        {},
        ["different kinds", "d.jsonl:1 is text + label", "d.jsonl:2 is text"],
    ),
    (
        "d.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n',
        {},
        ["labels are numbers in some rows", "1 at", "d.jsonl:1", "'1' at", "d.jsonl:2"],
    ),
    (
        "d.jsonl",
        '{"text": "a", "label": 0.5}\n',
        {"kind": "classification"},
        ["d.jsonl:1", "'label' must be a name or a whole number, not 0.5"],
    ),
    ("d.jsonl", '{"text": "a", "label": true}\n', {}, ["d.jsonl:1", "not True"]),
]


@pytest.mark.parametrize(("name", "content", "settings", "parts"), FAULTS)
def test_faults_name_place_and_remedy(tmp_path, name, content, settings, parts):
    with pytest.raises(DataError) as raised:
        read(tmp_path, name, content, **settings)
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_whole_emoji_and_many_shallow_brackets_are_rows(tmp_path):
    rows = [{"text": "\U0001f600", "notes": [[1]] * 200}]
    assert fields(read(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))) == [
        {"text": "\U0001f600"}
    ]


def test_columns_that_become_no_tokens_are_counted(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "input": text, "id": None} for text in ("", "x", "y")]
    data = read(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert data.unused == (("input", 2),)
    assert data.spread(2).unused == data.unused


def test_a_folder_is_called_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"this folder has no train\.\* to read, it holds no data file"):
        read_dataset(tmp_path, DataSettings())


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: No such file"):
        read_dataset(tmp_path / "none.csv", DataSettings())


def test_many_faults_are_counted(tmp_path):
    with pytest.raises(DataError, match=r"d\.csv:4.* and 7 more like these"):
        read(tmp_path, "d.csv", "mr,ref\n" + "a, \n" * 10, **COMPLETION)


def test_a_long_field_is_read_and_the_limit_put_back(tmp_path):
    import csv

    before = csv.field_size_limit()
    data = read(tmp_path, "d.csv", f"text\n{'x' * 300_000}\n")
    assert len(data.rows[0].fields["text"]) == 300_000
    assert csv.field_size_limit() == before


def numbered(tmp_path, count):
    return read(tmp_path, "n.jsonl", "".join(json.dumps({"text": str(i)}) + "\n" for i in range(count)))


def test_split_is_seeded_and_loses_nothing(tmp_path):
    data = numbered(tmp_path, 40)
    train, held = split(data, 0.1, seed=1)
    assert len(held.rows) == 4
    assert sorted((*train.rows, *held.rows), key=lambda row: row.line) == list(data.rows)
    assert list(split(data, 0.1, seed=1)[1].rows) == list(held.rows)
    assert list(split(data, 0.1, seed=2)[1].rows) != list(held.rows)
    with pytest.raises(DataError, match="too few"):
        split(numbered(tmp_path, 1), 0.5, seed=0)


def test_spread_takes_rows_evenly(tmp_path):
    data = numbered(tmp_path, 10)
    assert [row.fields["text"] for row in data.spread(4).rows] == ["0", "2", "5", "7"]
    assert data.spread(None) is data
    assert data.spread(99) is data


def test_labels_in_order(tmp_path):
    def labels(*values):
        return label_names(
            read(tmp_path, "l.jsonl", "".join(json.dumps({"text": "t", "label": v}) + "\n" for v in values))
        )

    assert labels(10, 9, -1) == ("-1", "9", "10")
    assert labels("no", "maybe", "no") == ("maybe", "no")
    with pytest.raises(DataError, match="every row has the label 'no'"):
        labels("no", "no")
