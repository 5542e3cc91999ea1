"""Every form a file may have gives the same rows; folders and several files; bad rows are counted or left out."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from chat_templates import byte_tokenizer
from lowrank.data.dataset import read_dataset
from lowrank.data.readers import plain
from lowrank.data.readers.record import Record
from lowrank.data.recipe import Recipe
from lowrank.data.settings import DataSettings
from lowrank.data.sources import TEST, VALID, has_part
from lowrank.data.tokens import encode
from lowrank.errors import DataError, LowrankWarning

ROWS = [{"prompt": 'é, "x"\none', "completion": "ü"}, {"prompt": "b", "completion": "c"}]
SHARED = Path(__file__).parents[2] / "shared" / "data"


def write(path, rows=ROWS):
    """The rows in the form that the name says."""
    import pyarrow
    from pyarrow import csv, feather, parquet

    packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    inner = path.with_suffix("") if packing else path
    table = pyarrow.Table.from_pylist(rows)
    if inner.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=1)
    elif path.name == "stream.arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif inner.suffix == ".arrow":
        feather.write_feather(table, path)
    elif inner.suffix == ".csv":
        csv.write_csv(table, inner)
    else:
        text = json.dumps(rows, indent=1) if inner.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows)
        inner.write_text("\ufeff" + text if "bom" in path.name else text, encoding="utf-8")
    if packing:
        with pyarrow.CompressedOutputStream(str(path), packing) as packed:
            packed.write(inner.read_bytes())
        inner.unlink()
    return path


def fields(data):
    return [row.fields for row in data.rows]


@pytest.mark.parametrize(
    "name",
    ["d.jsonl", "bom.jsonl", "d.json", "bom.json", "d.csv", "d.parquet", "d.arrow", "stream.arrow"]
    + [f"d.{form}.{packing}" for form in ("jsonl", "json", "csv") for packing in ("gz", "zst")],
)
def test_every_form_gives_the_same_rows(tmp_path, name):
    assert fields(read_dataset(write(tmp_path / name), DataSettings())) == ROWS


def test_rows_of_json_know_their_lines(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('[\n  {"text": "a"},\n\n  {\n "text": "b"\n}, {"text": "c"}]\n')
    assert [row.line for row in read_dataset(path, DataSettings()).rows] == [2, 4, 6]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')  # jsonl under the name of json
    assert [row.line for row in read_dataset(path, DataSettings()).rows] == [1, 2]


def test_plain_text_is_one_row(tmp_path):
    (tmp_path / "d.txt").write_text("one\ntwo\n")
    assert fields(read_dataset(tmp_path / "d.txt", DataSettings())) == [{"text": "one\ntwo\n"}]


def test_long_plain_text_is_rows_that_go_on(tmp_path, monkeypatch):
    """Parts end with a line, are the whole together, know their lines; bos and eos stand at the ends of the file."""
    monkeypatch.setattr(plain, "PART", 80)
    lines = [f"line {n} of a text, \n" + "\n" * (n % 3) for n in range(30)]
    text = "\n \n" + "".join(lines) + " \n" * 90
    (tmp_path / "d.txt").write_text(text)
    data = read_dataset(tmp_path / "d.txt", DataSettings())
    parts = [row.fields["text"] for row in data.rows]
    assert "".join(parts) == text and len(parts) > 5
    assert all(part.endswith("\n") and after[0] == "l" for part, after in pairwise(parts))
    assert [row.line for row in data.rows] == [1 + "".join(parts[:n]).count("\n") for n in range(len(parts))]
    found = encode(data, byte_tokenizer(), Recipe("text", "", 10**6)).examples
    (whole,) = byte_tokenizer()([text + "</s>"], add_special_tokens=False)["input_ids"]
    assert [token for example in found for token in example.ids] == whole


@pytest.mark.parametrize("text", ["x" * 500, "word " * 100, " " * 500, "\n" * 200 + "x", "x" + " " * 300])
def test_plain_text_without_lines_is_whole_too(tmp_path, monkeypatch, text):
    monkeypatch.setattr(plain, "PART", 40)
    (tmp_path / "d.txt").write_text(text)
    rows = [found for found in plain.read_plain(tmp_path / "d.txt", True).records if isinstance(found, Record)]
    assert "".join(row.fields["text"] for row in rows).strip() == text.strip()
    ends = ([True] + [False] * len(rows))[: len(rows)]
    assert [row.begins for row in rows] == ends and [row.ends for row in rows] == ends[::-1]
    assert all(len(row.fields["text"]) <= max(80, text.count(" ") + 1, text.count("\n") + 1) for row in rows)


def test_a_folder_has_parts(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[1:])
    write(tmp_path / "validation.jsonl", ROWS[:1])
    (tmp_path / "trainer_state.json").write_text("{}")
    assert fields(read_dataset(tmp_path, DataSettings())) == ROWS
    assert fields(read_dataset(tmp_path, DataSettings(), (TEST, VALID))) == ROWS[:1]
    assert has_part(tmp_path, VALID)
    assert not has_part(tmp_path, TEST)
    assert not has_part(tmp_path / "validation.jsonl", VALID)
    with pytest.raises(DataError, match=r"no test\.\* to read, it holds .*validation\.jsonl"):
        read_dataset(tmp_path, DataSettings(), (TEST,))


def test_several_files_with_commas_or_a_pattern(tmp_path):
    first, second = write(tmp_path / "a.jsonl", ROWS[:1]), write(tmp_path / "b.csv", ROWS[1:])
    data = read_dataset(f"{first},{second}", DataSettings())
    assert fields(data) == ROWS
    assert data.place(data.rows[1]) == f"{second}:2"
    assert fields(read_dataset(f"{tmp_path}/?.*", DataSettings())) == ROWS
    with pytest.raises(DataError, match="no file has a name like this"):
        read_dataset(f"{tmp_path}/*.x", DataSettings())
    write(tmp_path / "c.jsonl", [{"text": "t"}])
    with pytest.raises(DataError, match=r"different kinds: .*a\.jsonl:1 is .*c\.jsonl:1 is text"):
        read_dataset(f"{tmp_path}/?.*", DataSettings())


def test_bad_rows_are_an_error_or_left_out_and_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n["x"]\n{"text": ""}\n{"text": 1}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:2: not JSON.*:3: a row must.* and 1 more.*--bad-rows skip"):
        read_dataset(path, DataSettings())
    with pytest.warns(LowrankWarning, match=r"4 bad rows are left out: .*d\.jsonl:2"):
        assert fields(read_dataset(path, DataSettings(bad_rows="skip"))) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("d.json", '[{"text": "a"},\n{"text": ]', "d.json:2: not JSON"),
        ("d.json", '[{"text": "a"},\n', "d.json:2: not JSON (the array is not closed)"),
        ("d.json", "[1, 2]", "d.json:1: a row must be a JSON object, not int"),
        ("d.json", "", "d.json: the file holds no rows"),
        ("d.json", "[" * 5000, "d.json:1: "),
        ("d.txt", " \n", "d.txt: the file holds no rows"),
        ("d.parquet", "PAR1", "d.parquet: not readable as parquet"),
        ("d.arrow", "ARROW1", "d.arrow: not readable as arrow"),
        ("d.jsonl.gz", "text", "d.jsonl.gz: "),
        ("d.jsonl.zst", "text", "d.jsonl.zst: "),
    ],
)
def test_damaged_files_are_one_sentence(tmp_path, name, content, part):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as raised:
        read_dataset(tmp_path / name, DataSettings())
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


SHARED_FILES = [
    ("instruct/alpaca_en_demo.json", {}, "chat", 999),
    ("instruct/rasbt_instruction-data.json", {}, "chat", 1100),
    ("instruct/glaive_toolcall_en_demo.json", {}, "chat", 300),
    ("instruct/gsm8k", {}, "completion", 7473),
    ("e2e", {"prompt_column": "mr", "completion_column": "ref"}, "completion", 42061),
    ("glue/SST-2", {"text_column": "sentence"}, "classification", 67349),
    ("glue/CoLA", {"header": False, "text_column": "4", "label_column": "2"}, "classification", 8551),
    ("text/tinyshakespeare.txt", {}, "text", 1),
    ("instruct/dpo_en_demo.json", {}, "preference", 300),
]


@pytest.mark.parametrize(("name", "settings", "kind", "count"), SHARED_FILES)
def test_files_as_people_have_them(name, settings, kind, count):
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data, which is not part of the project")
    data = read_dataset(SHARED / name, DataSettings(**settings))
    assert (data.kind, len(data.rows)) == (kind, count)


def test_preference_rows_may_be_read_for_their_chosen_answers_alone(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}])
    assert read_dataset(path, DataSettings()).kind == "preference"
    data = read_dataset(path, DataSettings(completion_column="chosen"))
    assert fields(data) == [{"prompt": "p", "completion": "good"}]


def test_a_table_without_names_is_told_so(tmp_path):
    (tmp_path / "cola.tsv").write_text("gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThe breeze rode.\n")
    with pytest.raises(DataError, match=r"'The sailors rode the breeze\.'\) does not look like names of columns"):
        read_dataset(tmp_path / "cola.tsv", DataSettings())
    said = DataSettings(header=False, text_column="4", label_column="2")
    assert [row.fields["label"] for row in read_dataset(tmp_path / "cola.tsv", said).rows] == ["1", "0"]
    (tmp_path / "named.tsv").write_text("mr\tref\na\tb\n")
    with pytest.raises(DataError, match="say which column is which"):
        read_dataset(tmp_path / "named.tsv", DataSettings())
