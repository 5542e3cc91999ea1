"""Data larger than memory: what is read is not held, whatever the file is, and a disk without room is said."""

import errno
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank.data import encoding
from lowrank.data.cache import rows as kept_rows
from lowrank.data.cache import spool
from lowrank.data.cache.spool import NAME
from lowrank.data.dataset import read_dataset, split
from lowrank.data.packing import pack
from lowrank.data.readers import arrow, json_rows, plain, window
from lowrank.data.recipe import Recipe
from lowrank.data.settings import DataSettings
from lowrank.data.survey import survey
from lowrank.data.tokens import encode
from lowrank.errors import DataError, LowrankWarning, OutputError
from train_models import completion_rows, tokenizer, write_jsonl

LONG = "the cat is very red " * 40  # of which a row is 1.6 kB
RECIPE = Recipe("completion", "{prompt} ->", 64)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """(a cache of the test's own, a place of its own for temporary files), nothing of which stays in memory."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(spool, "HELD", 0)
    return tmp_path / "cache", tmp_path / "scratch"


def read(file, **settings):
    return read_dataset(file, DataSettings(**settings))


def rows(count):
    return ({"prompt": f"{number} {LONG}", "completion": LONG, "more": number} for number in range(count))


def as_jsonl(file, count):
    with file.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows(count))


def as_json(file, count):
    with file.open("w") as out:
        out.write("[")
        out.writelines((", " if number else "") + json.dumps(row) for number, row in enumerate(rows(count)))
        out.write("]")


def as_csv(file, count):
    with gzip.open(file, "wt") as out:
        out.write("prompt,completion,more\n")
        out.writelines(f"{row['prompt']},{row['completion']},{row['more']}\n" for row in rows(count))


def as_txt(file, count):
    with file.open("w") as out:
        out.writelines(f"{row['prompt']}\n" for row in rows(count))


def as_parquet(file, count):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows(count))), file, row_group_size=100)


WRITE = {"a.jsonl": as_jsonl, "a.json": as_json, "a.csv.gz": as_csv, "a.parquet": as_parquet, "a.txt": as_txt}


def peak(file, cache):
    """Bytes that Python and Arrow held at most while the file became tokens, packs and figures."""
    import pyarrow

    pool = pyarrow.default_memory_pool()
    tracemalloc.start()
    before = pool.bytes_allocated()
    most = 0
    try:
        train, held = split(read(file, cache=cache, bad_rows="skip"), 0.1, 0)
        for part in (train, held):
            found = encode(part, tokenizer(), replace(RECIPE, max_length=8, too_long="cut", train_on="all"))
            survey(found, tokenizer(), RECIPE)
            pack(found, 64)
        most = tracemalloc.get_traced_memory()[1] + pool.bytes_allocated() - before
    finally:
        tracemalloc.stop()
    return most


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", WRITE)
def test_four_times_the_rows_are_held_in_the_same_memory(name, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(window, "PIECE", 1 << 14)
    monkeypatch.setattr(arrow, "ROWS", 50)
    monkeypatch.setattr(plain, "PART", 1 << 14)
    monkeypatch.setattr(kept_rows, "CHARACTERS", 1 << 16)
    monkeypatch.setattr(kept_rows, "PART_CHARACTERS", 1 << 16)
    files = [tmp_path / f"{count}-{name}" for count in (300, 301, 1200)]
    for file in files:
        WRITE[name](file, int(file.name.split("-")[0]))
    peak(files[0], cache)  # what is imported and remembered once
    assert peak(files[2], cache) < peak(files[1], cache) + 700_000  # where 900 rows more are 1.4 MB


def test_without_a_cache_rows_go_through_a_file_that_has_no_name(tmp_path, places):
    cache, scratch = places
    file = write_jsonl(tmp_path / "a.jsonl", completion_rows(5000))
    data = read(file, cache=False)
    assert not cache.exists() and list(scratch.iterdir()) == []
    assert list(data.rows) == list(read(file).rows)
    left = scratch / f".{NAME}.ab12.{os.getpid()}-00000000.tmp"
    left.write_bytes(b"killed")
    read(file, cache=False)
    assert not left.exists()


def test_few_rows_touch_no_disk(tmp_path, places, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert len(read(write_jsonl(tmp_path / "a.jsonl", completion_rows(50)), cache=False).rows) == 50


def fill(folder, monkeypatch, after=20_000):
    """The disk of `folder` has so many bytes left."""
    real = spool.Summed.write

    def write(self, data):
        if folder in Path(self.file.name).parents and self.size + len(data) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    monkeypatch.setattr(spool.Summed, "write", write)


def test_a_cache_on_a_full_disk_is_said_and_the_rows_are_read_all_the_same(tmp_path, places, monkeypatch):
    cache, scratch = places
    file = write_jsonl(tmp_path / "a.jsonl", completion_rows(5000))
    wanted = list(read(file, cache=False).rows)
    fill(cache, monkeypatch)
    with pytest.warns(LowrankWarning, match=r"cannot be written \(No space left on device\).*LOWRANK_CACHE"):
        data = read(file)
    assert list(data.rows) == wanted
    assert list(cache.iterdir()) == list(scratch.iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert len(encode(data, tokenizer(), RECIPE).examples) == 5000


def test_no_disk_with_room_is_one_sentence(tmp_path, places, monkeypatch):
    _, scratch = places
    file = write_jsonl(tmp_path / "a.jsonl", completion_rows(5000))
    fill(scratch, monkeypatch)
    with pytest.raises(OutputError, match=r"scratch: .*No space left on device\); make room, .*TMPDIR$"):
        read(file, cache=False)
    assert list(scratch.iterdir()) == []


CHATS = [
    [{"role": "user", "content": f"what is the cat {n} ?"}, {"role": "assistant", "content": "red " * (n % 7 + 1)}]
    for n in range(400)
]
MARKED = (
    "{% for m in messages %}{{ m.role }} {% generation %}{{ m.content }} </s>{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
OF_KIND = {
    "chat": [{"messages": turns} for turns in CHATS],
    "completion": completion_rows(400),
    "text": [{"text": "the cat is red " * (n % 9 + 1)} for n in range(400)],
    "classification": [{"text": "the cat " * (n % 9 + 1), "label": ["bad", "good"][n % 2]} for n in range(400)],
    "preference": [{"chosen": turns, "rejected": [turns[0], {**turns[1], "content": "blue"}]} for turns in CHATS],
}


@pytest.mark.parametrize("kind", OF_KIND)
def test_tokens_do_not_depend_on_parts_and_threads(kind, tmp_path, monkeypatch):
    data = read(write_jsonl(tmp_path / "a.jsonl", OF_KIND[kind]), cache=False)
    template = MARKED if data.speaks else ""
    recipe = Recipe(kind, "{prompt} ->", 16, ("bad", "good"), chat_template=template)

    def found(threads, rows, processes=1):
        monkeypatch.setattr(encoding, "useful", lambda: processes)
        monkeypatch.setattr(encoding, "THREADS", threads)
        monkeypatch.setattr(kept_rows, "PART_ROWS", rows)
        made = encode(data, tokenizer(pad=True), recipe)
        counts = (made.cut, made.dropped, made.split, made.tokens, made.trained, made.between)
        return [(e.ids, e.labels, e.type_ids) for e in made.examples], counts

    whole = found(1, 10_000)
    assert found(1, 7) == whole and len(whole[0]) >= 400
    assert found(1, 64, processes=2) == found(1, 10, processes=5) == whole
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns within a row
    try:
        assert found(2, 64) == found(8, 3) == whole
    finally:
        sys.setswitchinterval(before)


def test_rows_that_json_does_not_know_are_rows(tmp_path, places):
    import datetime

    import pyarrow
    from pyarrow import parquet

    day = datetime.date(2026, 1, 2)
    call = {"name": "f", "arguments": {"day": day}}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": said}] * 3), tmp_path / "a.parquet")
    data = read(tmp_path / "a.parquet")
    found = [row.chat.messages[1].fields["tool_calls"][0]["function"]["arguments"]["day"] for row in data.rows]
    assert found == [day] * 3 and data.key == ""
    assert list(places[0].iterdir()) == []
    assert len(data.choose([2, 0]).rows) == 2 and data.choose([2]).rows[0].line == 3


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "a"},\n{"text": "b [1, 2]"}\n]\n',
        '{"text": "a"}\n\n{"text": "\\u00e9\\n"} {"text": "c"}',
        '[12, {"text": "a"}, "b", 345]',
        " [ ] ",
        "",
        '[{"text": "a"}, {"text": ',
        '[{"text": "a"}\n, {"text" "b"}]',
        '[{"text": "a"}',
    ],
)
def test_json_in_pieces_is_json(text, piece, tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text(text)

    def said():
        try:
            return list(json_rows.read_json(file, True).records)
        except DataError as error:
            return str(error)

    whole = said()
    monkeypatch.setattr(window, "PIECE", piece)
    found = said()
    if isinstance(whole, str):
        assert found.split(" at column")[0] == whole.split(" at column")[0]  # the column counts from what is held
    else:
        assert found == whole


MEASURE = """
import sys, threading, time
from pathlib import Path
from lowrank.data.dataset import read_dataset, split
from lowrank.data.recipe import Recipe
from lowrank.data.settings import DataSettings
from lowrank.data.tokens import encode
from train_models import tokenizer

most, done = 0, False
def watch():
    global most
    while not done:
        line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
        most = max(most, int(line.split()[1]))
        time.sleep(0.02)
thread = threading.Thread(target=watch)
thread.start()
data = read_dataset(sys.argv[1], DataSettings(cache=sys.argv[2] == "cache"))
train, held = split(data, 0.01, 0)
encode(train, tokenizer(), Recipe("completion", "{prompt} ->", 64, too_long="cut", train_on="all"))
done = True
thread.join()
print(most // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux says it")
@pytest.mark.parametrize("cache", ["cache", "none"])
def test_ten_times_the_file_in_the_same_memory(cache, tmp_path, places, monkeypatch):
    """RssAnon: what is in memory and in no file. Mapped pages are the kernel's, which takes them back when it likes."""
    found = []
    for count in (15_000, 150_000):  # 24 and 240 MB, and as much again as rows and tokens
        as_jsonl(tmp_path / "a.jsonl", count)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / "a.jsonl"), cache],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(int(done.stdout))
    print(f"RssAnon at most, MB: {found[0]} for 24 MB of rows, {found[1]} for 240")
    assert found[1] < found[0] + 100
