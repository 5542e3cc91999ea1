"""The cache of rows and tokens: what comes back is what was kept, and nothing that changed or broke is believed."""

import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank.data.cache import place, store
from lowrank.data.cache.keys import tokens_key
from lowrank.data.cache.place import clear, root
from lowrank.data.cache.rows import StoredRows
from lowrank.data.cache.tokens import StoredExamples
from lowrank.data.dataset import read_dataset, split
from lowrank.data.recipe import Recipe
from lowrank.data.settings import DataSettings
from lowrank.data.tokens import encode
from lowrank.errors import LowrankWarning
from train_models import completion_rows, label_rows, tokenizer, write_jsonl

CHAT = {
    "messages": [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": [1, 2.5, None, "é"]}}]},
        {"role": "tool", "content": "red"},
        {"role": "assistant", "content": "is red", "train": False},
        {"role": "assistant", "content": "good"},
    ],
    "tools": [{"name": "f", "parameters": {"type": "object"}}],
}
PREFERENCE = {"prompt": "what is the cat ?", "chosen": "the red cat", "rejected": "the blue cat"}
SAYS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "red"}]
CONVERSATIONS = {"chosen": SAYS, "rejected": [SAYS[0], {"role": "assistant", "content": "blue"}]}
FILES = {
    "completion": completion_rows(5),
    "text": [{"text": "the cat is very very red"}, {"text": "good"}],
    "classification": label_rows(5),
    "regression": [{"text": "the cat", "label": 1.25}, {"text": "a dog", "label": -3}],
    "chat": [CHAT],
    "preference": [PREFERENCE],
    "conversations": [CONVERSATIONS],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(file, **settings):
    return read_dataset(file, DataSettings(**settings))


def recipe_of(data, **changes):
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} </s>{% endfor %}" if data.speaks else ""
    labels = ("bad", "good") if data.kind == "classification" else ()
    return replace(Recipe(data.kind, "{prompt} ->", 16, labels, chat_template=template), **changes)


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


def plain(examples):
    return [(list(e.ids), list(e.labels), None if e.type_ids is None else list(e.type_ids)) for e in examples]


@pytest.mark.parametrize("name", FILES)
def test_rows_and_tokens_come_back_as_they_were(name, tmp_path, cache):
    file = write_jsonl(tmp_path / f"{name}.jsonl", FILES[name])
    fresh = read(file, cache=False)
    assert not cache.exists()
    for turn in range(2):
        found = read(file)
        assert isinstance(found.rows, StoredRows) and list(found.rows) == list(fresh.rows)
        assert (found.path, found.kind, found.unused) == (fresh.path, fresh.kind, fresh.unused)
        wanted = encode(fresh, tokenizer(pad=True), recipe_of(fresh))
        tokens = encode(found, tokenizer(pad=True), recipe_of(found))
        assert isinstance(tokens.examples, StoredExamples) and tokens.reused == (turn == 1)
        assert plain(tokens.examples) == plain(wanted.examples)
        assert [type(e.labels[0]) for e in tokens.examples] == [type(e.labels[0]) for e in wanted.examples]
        assert (tokens.cut, tokens.dropped, tokens.split) == (wanted.cut, wanted.dropped, wanted.split)
        assert (tokens.tokens, tokens.trained) == (wanted.tokens, wanted.trained)
    assert len(kept(cache)) == 2


def test_whatever_matters_makes_another_key(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", completion_rows(6))
    first = read(file)
    assert read(file).key == first.key
    assert read(file, bad_rows="skip").key != first.key
    one, other = split(first, 0.5, 0)
    keys = {first.key, one.key, other.key, split(first, 0.5, 1)[0].key}
    assert len(keys) == 4 and first.spread(3).key not in keys
    write_jsonl(file, completion_rows(6, seed=1))
    assert read(file).key != first.key
    recipe, own = recipe_of(first), tokenizer()
    bigger = tokenizer()
    bigger.add_tokens(["new"])
    changes = [{"max_length": 9}, {"template": "{prompt}"}, {"train_on": "all"}, {"too_long": "drop"}]
    found = {tokens_key(first.key, own, replace(recipe, **change)) for change in [{}, *changes]}
    found |= {tokens_key(first.key, bigger, recipe), tokens_key(first.key, tokenizer(eos=False), recipe)}
    assert len(found) == 7 and tokens_key("", own, recipe) == ""


def test_chosen_rows_are_those_rows(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", completion_rows(9))
    stored, fresh = read(file), read(file, cache=False)
    for one, other in zip(split(stored, 0.3, 1), split(fresh, 0.3, 1), strict=True):
        assert list(one.rows) == list(other.rows)
        assert list(one.spread(2).rows) == list(other.spread(2).rows)
    assert stored.rows[-1] == fresh.rows[-1] and list(stored.rows[2:4]) == list(fresh.rows[2:4])
    with pytest.raises(IndexError):
        stored.rows[9]


@pytest.mark.parametrize("at", [0, 40, -1, -20, "cut", "empty"])
def test_a_broken_file_is_noticed_and_made_again(at, tmp_path, cache):
    file = write_jsonl(tmp_path / "a.jsonl", completion_rows(9))
    fresh = read(file, cache=False)
    read(file)
    (name,) = kept(cache)
    good = (cache / name).read_bytes()
    broken = bytearray(good)
    if isinstance(at, int):
        broken[at] ^= 4
    (cache / name).write_bytes({"cut": good[:-9], "empty": b""}.get(at, bytes(broken)))
    assert store.get(name.removesuffix(place.ENDING)) is None
    assert list(read(file).rows) == list(fresh.rows)
    assert (cache / name).read_bytes() == good  # and the same rows have the same bytes


def test_bad_rows_are_warned_of_again(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [*completion_rows(2), {"prompt": "a", "completion": ""}])
    for _ in range(2):
        with pytest.warns(LowrankWarning, match="1 bad rows are left out"):
            assert len(read(file, bad_rows="skip").rows) == 2


@pytest.mark.skipif(os.name == "nt", reason="a file in the way is another error there")
def test_a_place_that_cannot_be_written_means_no_cache_and_is_said_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "file" / "cache"))
    file = write_jsonl(tmp_path / "a.jsonl", completion_rows(3))
    with pytest.warns(LowrankWarning, match="cannot be written .*LOWRANK_CACHE.*--no-cache"):
        data = read(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(encode(data, tokenizer(), recipe_of(data)).examples) == 3


def test_two_at_once_keep_one_file(tmp_path, cache):
    data = read(write_jsonl(tmp_path / "a.jsonl", completion_rows(3000)), cache=False)
    recipe, own = recipe_of(data), tokenizer()
    wanted = plain(encode(data, own, recipe).examples)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: encode(replace(data, key="key"), own, recipe), range(8)))
    assert len(kept(cache)) == 1
    assert all(plain(one.examples) == wanted for one in found)


def half_written(cache):
    """What a process that is no more left there."""
    left = cache / f".key{place.ENDING}.ab12.{os.getpid()}-00000000.tmp"  # its number is ours now, its token is not
    left.write_bytes(b"killed")
    return left


def test_what_a_killed_training_left_is_swept_by_the_next_one(tmp_path, cache):
    read(write_jsonl(tmp_path / "a.jsonl", completion_rows(3)))
    left = half_written(cache)
    read(write_jsonl(tmp_path / "b.jsonl", completion_rows(4)))
    assert not left.exists() and len(kept(cache)) == 2


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_nobody_else_may_read_what_is_kept(tmp_path, cache):
    read(write_jsonl(tmp_path / "a.jsonl", completion_rows(3)))
    (name,) = kept(cache)
    assert (cache / name).stat().st_mode & 0o077 == 0 and cache.stat().st_mode & 0o077 == 0


def test_clear_deletes_what_is_ours_and_running_readers_go_on(tmp_path, cache):
    file = write_jsonl(tmp_path / "a.jsonl", completion_rows(3))
    data = read(file)
    (cache / "other").write_text("not ours")
    half_written(cache)
    files, size = clear()
    assert (files, kept(cache)) == (2, ["other"]) and size > 6
    assert list(data.rows) == list(read(file, cache=False).rows)
    assert clear() == (0, 0)


def test_the_place_follows_the_environment(monkeypatch):
    monkeypatch.setenv("LOWRANK_CACHE", "here")
    assert root() == Path("here")
    monkeypatch.delenv("LOWRANK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert root() == Path("/xdg/lowrank")


def test_a_pipe_is_read_once_and_not_kept(tmp_path, cache):
    from threading import Thread

    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    text = "".join(json.dumps(row) + "\n" for row in completion_rows(3))
    writer = Thread(target=pipe.write_text, args=(text,))
    writer.start()
    assert len(read(pipe).rows) == 3
    writer.join()
    assert not cache.exists()
