"""Whole data sets of the Hub: through `datasets`, from its cache, as files that our own readers read."""

import json
import shutil
import sys
from types import SimpleNamespace

import pyarrow
import pytest

from lowrank import hub
from lowrank.data.dataset import read_dataset
from lowrank.data.settings import DataSettings
from lowrank.data.sources import TEST, TRAIN, VALID, files_of
from lowrank.errors import DataError

SHA = "a" * 40
SPLITS = {"train": 3, "validation": 2}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """What `datasets` leaves in its cache for the set org/talks: an arrow stream a split, and what it says of them."""
    folder = tmp_path / "org___talks" / "default" / "0.0.0" / SHA
    folder.mkdir(parents=True)
    text = {"dtype": "string", "_type": "Value"}
    about = {"builder_name": "parquet", "dataset_name": "talks", "config_name": "default"}
    about |= {"version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}}
    about |= {"features": {"prompt": text, "completion": text}, "splits": {}}
    for name, count in SPLITS.items():
        table = pyarrow.table({"prompt": [f"{name} {i}" for i in range(count)], "completion": ["x"] * count})
        with pyarrow.ipc.new_stream(folder / f"talks-{name}.arrow", table.schema) as stream:
            stream.write_table(table)
        about["splits"][name] = {"name": name, "num_bytes": 99, "num_examples": count, "dataset_name": "talks"}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def stub(cache, monkeypatch):
    """A `datasets` that knows one set."""
    asked = []

    def load(repo, config, revision=None):
        asked.append((repo, config, revision))
        if repo != "org/talks":
            raise ConnectionError(f"Couldn't reach {repo!r}\non the Hub")
        files = {name: [{"filename": str(cache / f"talks-{name}.arrow")}] for name in SPLITS}
        return {name: SimpleNamespace(cache_files=found) for name, found in files.items()}

    logging = SimpleNamespace(get_verbosity=lambda: 30, set_verbosity=lambda _level: None, CRITICAL=50)
    module = SimpleNamespace(load_dataset=load, utils=SimpleNamespace(logging=logging))
    module.are_progress_bars_disabled = lambda: False
    module.disable_progress_bars = module.enable_progress_bars = lambda: None
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def prompts(*parts):
    return [row.fields["prompt"] for row in read_dataset("org/talks", DataSettings(), parts).rows]


def held(cache):
    assert prompts(TRAIN) == ["train 0", "train 1", "train 2"]
    assert prompts(TEST, VALID) == ["validation 0", "validation 1"]
    with pytest.raises(DataError, match="org/talks: the data set has no split for test, only train, validation"):
        files_of("org/talks", (TEST,))


def test_a_set_is_read_split_by_split(cache, stub):
    held(cache)
    files_of("org/talks@v2:main", (TRAIN,))
    assert stub[-1] == ("org/talks", "main", "v2")
    with pytest.raises(
        DataError, match=r"org/none: .* cannot load a set of this name \(Couldn't reach 'org/none' on the Hub\)"
    ):
        files_of("org/none", (TRAIN,))


def test_the_real_package_reads_its_cache_alike(cache, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache.parents[3])
    held(cache)
    with pytest.raises(DataError, match=r"org/none: .* cannot load a set of this name"):
        files_of("org/none", (TRAIN,))
    with pytest.raises(DataError, match="cannot load a set of this name"):
        files_of("org/talks:other", (TRAIN,))


def test_a_run_keeps_the_commit_and_another_one_in_the_cache_is_not_taken_for_it(cache, stub):
    """Offline, `datasets` gives what it has, whatever revision is asked for."""
    assert hub.pinned("org/talks:main", read_dataset("org/talks:main", DataSettings()).file) == f"org/talks@{SHA}:main"
    assert prompts(TRAIN) == [row.fields["prompt"] for row in read_dataset(f"org/talks@{SHA}", DataSettings()).rows]
    other = "b" * 40
    with pytest.raises(DataError, match=f"org/talks@{other}: .* the cache of datasets has it at {SHA} only"):
        files_of(f"org/talks@{other}", (TRAIN,))
    shutil.copytree(cache, cache.parent / other)
    assert files_of(f"org/talks@{other}", (TRAIN,)) == [cache.parent / other / "talks-train.arrow"]


def test_without_the_package_it_is_said_how_to_have_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"as in org/talks:train\.jsonl, .*not installed: pip install \"lowrank\[datasets\]\""
    ):
        files_of("org/talks", (TRAIN,))


def test_a_file_and_a_path_are_no_sets(cache):
    for name in ("org/talks:train.jsonl", "data/train.jsonl", "talks", "./org/talks", "org/talks/x"):
        assert hub.data_set(name) is None
    (cache.parents[3] / "org").mkdir()
    (cache.parents[3] / "org" / "talks").mkdir()
    assert hub.data_set("org/talks") is None  # what is here wins
    assert hub.data_set("org/set:main") == hub.HubId("org/set", None, "main")
