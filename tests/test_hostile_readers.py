"""The readers' promise holds: for what fuzzing once found (tests/hostile/reader-*), and for some fresh cases."""

import shutil
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

HOSTILE = Path(__file__).parent / "hostile"
sys.path.insert(0, str(HOSTILE))

import byte_formats  # noqa: E402
import readers  # noqa: E402
import rows  # noqa: E402

from lowrank.errors import CheckpointError  # noqa: E402

KEPT = sorted(HOSTILE.glob("reader-*"))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """One sound adapter of every kind."""
    folder = tmp_path_factory.mktemp("seeds")
    readers.make_seeds(folder)
    return folder


@pytest.mark.parametrize("kind", readers.KINDS)
def test_the_seeds_are_sound(seeds, tmp_path, kind):
    """Without damage every reader answers, so a refusal is the damage's."""
    folder = shutil.copytree(seeds / kind, tmp_path / kind)
    for call in readers.calls(folder, kind):
        if kind not in ("whole", "rows", "experts"):  # full copies, tables, rows and stacks: not for mlx-lm and loralib
            call()
    assert readers.broken_promise(folder, kind) is None


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_kept_cases(case, tmp_path):
    """What broke the promise once keeps it now; kind.txt says what it was."""
    folder = shutil.copytree(case, tmp_path / "case", symlinks=True)
    assert readers.broken_promise(folder, (case / "kind.txt").read_text().split()[0]) is None


@pytest.mark.parametrize("case", sorted(HOSTILE.glob("bytes-*")), ids=lambda case: case.name)
def test_kept_bytes(case):
    """The same for bytes that went straight to a reader."""
    assert byte_formats.broken_promise(case.read_bytes()) is None


def test_fresh_bytes(tmp_path):
    """Sound files of every byte format are read, and a thousand damaged ones keep the promise."""
    corpus = byte_formats.make_corpus()
    assert {case[0] for case in corpus} == set(range(len(byte_formats.ORDER)))
    for case in corpus:
        refused = case[0] == list(byte_formats.FORMATS).index("loralib") and b"lora_down" in case
        with pytest.raises(CheckpointError, match="kohya") if refused else nullcontext():
            byte_formats.ORDER[case[0]](case[1:])
    assert byte_formats.fuzz_blind(Namespace(minutes=1, cases=1000, seed=0, keep=tmp_path)) == 0


def test_fresh_cases(seeds, tmp_path):
    """The first cases of the fuzz target's own sequence."""
    for number in range(140):
        folder = tmp_path / str(number)
        kind = readers.make_case(seeds, folder, number, seed=0)
        assert readers.broken_promise(folder, kind) is None, (number, kind)
        shutil.rmtree(folder)


@pytest.mark.parametrize("case", sorted(HOSTILE.glob("rows-*")), ids=lambda case: case.name)
def test_kept_rows(case):
    """The same for files of data."""
    assert rows.broken_promise(case) is None


def test_sound_rows_are_trained(tmp_path):
    """Without damage every seed becomes tokens, so a refusal is the damage's; and what is wrong with a mask is seen."""
    for seed in rows.SEEDS:
        path = tmp_path / "rows.jsonl"
        other = {**seed, **({"label": {1: 2, "good": "bad", 3.5: 4.5}[seed["label"]]} if "label" in seed else {})}
        rows.write(path, [seed, other])
        settings = rows.DataSettings(cache=False)
        data = rows.read_dataset(path, settings)
        tok = rows.tokenizer("headers")
        labels = rows.label_names(data) if data.kind == "classification" else ()
        made = rows.encode(data, tok, rows.make_recipe(settings, data.kind, tok, 512, labels, speaks=data.speaks))
        assert len(made.examples) == 2
        assert rows.wrong(data, made, tok, settings) is None
        if data.kind == "chat":
            everything = [replace(e, labels=[rows.IGNORED, *e.ids[1:]]) for e in made.examples]
            assert "nobody of the assistant's" in (
                rows.wrong(data, replace(made, examples=everything), tok, settings) or ""
            )


def test_fresh_rows(tmp_path):
    """The first cases of the fuzz target's own sequence."""
    for number in range(300):
        rows.make_case(tmp_path / "case", number, seed=0)
        assert rows.broken_promise(tmp_path / "case") is None, number
        shutil.rmtree(tmp_path / "case")
