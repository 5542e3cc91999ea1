"""Names on the Hub, from a cache made by hand: no network is touched."""

import json
from pathlib import Path

import pytest
import yaml

from lowrank import cli, hub
from lowrank.errors import CheckpointError, DataError
from train_models import completion_rows, save_llama, write_jsonl

SHA, OTHER = "a" * 40, "b" * 40


def cached(cache: Path, kind: str, repo: str, revision: str = SHA, ref: str = "main") -> Path:
    """The folder of a snapshot in a cache, as huggingface_hub lays it out."""
    store = cache / f"{kind}s--{repo.replace('/', '--')}"
    (store / "refs").mkdir(parents=True, exist_ok=True)
    (store / "refs" / ref).write_text(revision)
    folder = store / "snapshots" / revision
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("hub")
    save_llama(cached(home / "cache", "model", "org/llama"))
    save_llama(cached(home / "cache", "model", "org/llama", OTHER, "tuned"), seed=1)
    write_jsonl(cached(home / "cache", "dataset", "org/set") / "rows.jsonl", completion_rows(30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
        patch.chdir(home)
        line = "train --model org/llama --data org/set:rows.jsonl --out run --steps 2 --device cpu"
        assert cli.main(line.split()) == 0
    adapter = cached(home / "cache", "model", "me/skill")
    for file in (home / "run").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    return home


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("org/llama", hub.HubId("org/llama")),
        ("org/llama-2.7b_x@v1.0", hub.HubId("org/llama-2.7b_x", "v1.0")),
        ("org/llama@refs/pr/7", hub.HubId("org/llama", "refs/pr/7")),
        ("org/set:data/rows.jsonl", hub.HubId("org/set", None, "data/rows.jsonl")),
        ("org/set@main:rows.jsonl", hub.HubId("org/set", "main", "rows.jsonl")),
        *(
            (path, None)
            for path in ("llama", "./org/llama", "/org/llama", "org/llama/", "a/b/c", "../llama", "~/llama")
        ),
    ],
)
def test_what_is_a_name_on_the_hub(name, wanted):
    assert hub.hub_id(name) == wanted
    assert wanted is None or str(wanted) == name


def test_what_is_here_wins(here, monkeypatch):
    assert hub.local_folder("org/llama").name == SHA
    (here / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(here / "work")
    Path("org/llama").mkdir(parents=True, exist_ok=True)
    assert hub.local_folder("org/llama") == Path("org/llama")


def test_a_run_says_which_commit_it_had(here):
    settings = yaml.safe_load((here / "run/train.yaml").read_text())
    record = json.loads((here / "run/run.json").read_text())
    for said in (settings, record):
        assert said["model"] == f"org/llama@{SHA}"
        assert said["data"] == f"org/set@{SHA}:rows.jsonl"
    config = json.loads((here / "run/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/llama", SHA)


RIGHT = [
    "train --config run/train.yaml --out again --steps 1",
    "eval --model org/llama --adapter me/skill --data org/set:rows.jsonl --rows 4 --device cpu",
    "generate --model org/llama@main --adapter me/skill@main --prompt cat --max-new-tokens 2 --device cpu",
    "rank --model org/llama --data org/set:rows.jsonl --sample 4 --device cpu",
    "rank --adapter me/skill",
    "inspect me/skill --model org/llama",
    "merge --model org/llama --adapter me/skill:0.5 --out merged",
    "combine --adapter me/skill --adapter me/skill:0.5 --out both",
    "extract --model org/llama --tuned org/llama@tuned --rank 2 --out extracted",
    "resize --adapter me/skill --rank 2 --out small",
    "convert --source me/skill --to gguf --model org/llama --out skill.gguf",
    "dimension --model org/llama --data org/set:rows.jsonl --steps 1 --ladder 2 --seeds 1 --out d --device cpu",
    "doctor --model org/llama",
]


@pytest.mark.parametrize("line", RIGHT)
def test_every_command_takes_them(here, capsys, line):
    assert cli.main(line.split()) == 0, capsys.readouterr().err


def test_library_functions_take_them(here):
    import lowrank
    from lowrank.train.models import find_model, load_causal

    model = load_causal(find_model("org/llama"), None)
    assert len(lowrank.load_adapter(model, "me/skill").modules) == 4
    assert lowrank.read_adapter("me/skill").folder.name == SHA
    lowrank.merge_checkpoint("org/llama", "me/skill", here / "by-library")
    assert "`org/llama` with `me/skill` merged" in (here / "by-library/README.md").read_text()


WRONG = [
    ("generate --model org/none --prompt a", "org/none: there is no such folder here, and the Hub's cache does not"),
    ("generate --model org/llama@v9 --prompt a", "org/llama@v9: there is no such folder here"),
    ("eval --model org/llama --adapter me/none --data org/set:rows.jsonl", "me/none: there is no such folder here"),
    ("eval --model org/llama --data org/set:none.jsonl", "org/set:none.jsonl: there is no such file here"),
    ("eval --model org/llama --data org/set", "org/set: there is no such file here"),
    ("eval --model org/llama --data runs/none.jsonl", "data file runs/none.jsonl: No such file"),
    ("merge --model org/none --adapter me/skill --out x", "org/none: there is no such folder here"),
    ("inspect me/none", "me/none: there is no such folder here"),
    ("convert --source me/none --out x", "me/none: there is no such folder here"),
    ("doctor --model org/none", "org/none: there is no such folder here"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_what_the_cache_does_not_hold_is_one_sentence(here, capsys, line, message):
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and len(err) < 300
    assert not Path("x").exists()


def test_neither_code_nor_pickles_are_fetched(here, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(repo, **how):
        asked.update(how)
        return str(here / f"cache/models--org--llama/snapshots/{SHA}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub.local_folder("org/llama@v1")
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["adapter_config.json", "adapter_model.safetensors", "lowrank.json", "tokenizer.model", "merges.txt"]
    unwanted = ["modeling_llama.py", "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt", "x.pkl"]
    unwanted += ["onnx/model.safetensors", "consolidated.safetensors", "README.md", "tf_model.h5", "code/run.json"]
    found = filter_repo_objects(
        wanted + unwanted, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(found) == wanted
    assert asked["revision"] == "v1"


def test_a_model_with_pickles_alone_is_refused(here):
    folder = cached(here / "cache", "model", "org/pickled")
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"org/pickled: on the Hub it has no safetensors weights"):
        hub.local_folder("org/pickled")


def test_the_hubs_refusals_are_sentences(here, monkeypatch):
    from huggingface_hub import errors

    def refuse(kind):
        def download(*_args, **_how):
            raise kind("first line\nsecond") if kind is OSError else kind.__new__(kind)  # as if with a response

        return download

    for kind, words in [
        (errors.GatedRepoError, "ask at https://huggingface.co/org/x, then run `hf auth login`"),
        (errors.RepositoryNotFoundError, "the Hub has none of that name"),
        (errors.RevisionNotFoundError, "has no revision v2"),
        (OSError, "fetching it from the Hub failed: first line second"),
    ]:
        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse(kind))
        with pytest.raises(CheckpointError, match="org/x@v2: there is no such folder here") as caught:
            hub.local_folder("org/x@v2")
        assert words in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse(errors.RemoteEntryNotFoundError))
    with pytest.raises(DataError, match=r"data set org/x has no file a\.csv"):
        hub.local_file("org/x:a.csv")
