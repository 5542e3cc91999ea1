"""No command writes to what it did not make: inputs, whatever their spelling; others' files; places in use."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank import cli
from lowrank.checkpoint.outputs import any_file, claimed, new_file
from lowrank.errors import OutputError
from output_cases import COMMANDS, ENDINGS, FILES, FOLDERS, inputs_of, make_inputs, snapshot


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("outputs")
    make_inputs(home)
    return home


@pytest.fixture(autouse=True)
def _here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def refused(capsys: pytest.CaptureFixture[str], line: str, place: Path | str, *more: str) -> str:
    """The sentence that a command refuses a place with."""
    assert cli.main([*line.split(), str(place), *more]) == 2, (line, place)
    said = capsys.readouterr().err
    assert said.startswith("lowrank: error: ") and said.count("\n") == 1
    return said


def spellings(source: Path, scratch: Path, ending: str) -> list[Path]:
    """Names of `source` and of places in it."""
    (scratch / f"link{ending}").symlink_to(source)
    around = source.parent / source.parent.name / ".." if source.parent.parent == source else source.parent / "base/.."
    found = [source, Path(source.name), around / source.name, scratch / f"link{ending}"]
    if source.is_file():
        return found
    weights = next(path for path in source.iterdir() if path.suffix in (".safetensors", ".bin"))
    (scratch / f"weights{ending}").symlink_to(weights)
    inside = [f"new{ending}", f"deep/new{ending}", weights.name, ".", "../base/../" + source.name]
    through = scratch / f"link{ending}" / f"new{ending}"
    return [*found, scratch / f"weights{ending}", *(source / name for name in inside), through]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_input_is_never_written_to(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(home)
    more = ["--force"] if name in FILES else []
    for number, source in enumerate(inputs_of(COMMANDS[name], home)):
        (tmp_path / str(number)).mkdir()
        ending = ENDINGS.get(name, "")
        for place in spellings(source, tmp_path / str(number), ending):
            said = refused(capsys, COMMANDS[name], place, *more)
            wrong = ending and not str(place).endswith(ending)
            assert "inputs are never written to" in said or (wrong and "must end in" in said), said
        assert snapshot(home) == before


@pytest.mark.parametrize("name", [name for name in FILES if " adapter" in FILES[name]])
def test_another_name_of_an_inputs_file_is_the_input(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a cache of models, where files are links to blobs that lie elsewhere."""
    weights = home / "adapter" / "adapter_model.safetensors"
    ending = ENDINGS.get(name, "")
    shutil.copyfile(weights, tmp_path / f"blob{ending}")
    copy = shutil.copytree(home / "adapter", tmp_path / "copy")
    (copy / weights.name).unlink()
    (copy / weights.name).symlink_to(tmp_path / f"blob{ending}")
    os.link(tmp_path / f"blob{ending}", tmp_path / f"second-name{ending}")
    line = COMMANDS[name].replace(" adapter", f" {copy}")
    before = snapshot(tmp_path)
    for place in ("blob", "second-name"):
        assert "under another name" in refused(capsys, line, tmp_path / f"{place}{ending}", "--force")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_use_stays_as_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "train.yaml").write_text("lr: 1e-3  # mine")
    shutil.copytree("adapter", tmp_path / "adapter")
    before = snapshot(tmp_path)
    assert "holds chapter.tex" in refused(capsys, COMMANDS[name], tmp_path / "thesis")
    assert "is a file" in refused(capsys, COMMANDS[name], tmp_path / "thesis" / "chapter.tex")
    assert "not empty" in refused(capsys, COMMANDS[name], tmp_path / "settings")
    assert "not empty" in refused(capsys, COMMANDS[name], tmp_path / "adapter")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_replaced_only_where_that_is_allowed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, folder = (tmp_path / f"{one}{ENDINGS.get(name, '')}" for one in ("mine", "folder"))
    mine.write_text("x")
    folder.mkdir()
    assert "exists: give another name" in refused(capsys, COMMANDS[name], mine)
    assert "is a folder" in refused(capsys, COMMANDS[name], folder, "--force")
    refused(capsys, COMMANDS[name], "", "--force")
    assert snapshot(tmp_path) == {mine.name: b"x", folder.name: None}
    assert cli.main([*COMMANDS[name].split(), str(mine), "--force"]) == 0
    capsys.readouterr()
    assert cli.main([*COMMANDS[name].split(), str(folder / "deep" / mine.name)]) == 0
    inside = {f"{folder.name}/deep", f"{folder.name}/deep/{mine.name}"}
    assert snapshot(tmp_path).keys() == {mine.name, folder.name, *inside}
    assert mine.read_bytes() != b"x"


@pytest.mark.parametrize("name", COMMANDS)
def test_one_process_at_a_time(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / f"out{ENDINGS.get(name, '')}"
    with claimed(out, {}, new_file):
        said = refused(capsys, COMMANDS[name], out)
        assert f"another process ({os.getpid()}) is writing" in said
    assert snapshot(tmp_path) == {}  # the folder above was made for the lock alone
    assert cli.main([*COMMANDS[name].split(), str(out)]) == 0
    assert os.listdir(tmp_path / "new") == [out.name]


def test_two_trainings_with_one_out(tmp_path: Path) -> None:
    """One is told; the other has its settings, its log and its adapter to itself."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "lowrank", *COMMANDS["train"].split(), str(tmp_path / "out"), "--rank", str(rank)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in (3, 5)
    ]
    said = [process.communicate()[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2]
    won = [process.returncode for process in started].index(0)
    assert "is writing" in said[1 - won] or "not empty" in said[1 - won]
    assert f"rank: {(3, 5)[won]}\n" in (tmp_path / "out" / "train.yaml").read_text()
    assert f'"r": {(3, 5)[won]}' in (tmp_path / "out" / "adapter_config.json").read_text()
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_alone_can_be_written_is_locked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mounted folder in a container is."""
    (tmp_path / "out").mkdir()
    real = os.open

    def read_only_above(path: str | Path, flags: int, *rest: int) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only_above)
    with claimed(tmp_path / "out", {}) as place:
        assert place == tmp_path / "out"
        with pytest.raises(OutputError, match="another process is writing"), claimed(place, {}):
            pass
    with claimed(tmp_path / "out", {}):
        pass
    with pytest.raises(OutputError, match=r"cannot write to .* \(Permission denied\)"), claimed(tmp_path / "new", {}):
        pass


def test_places_that_are_none(tmp_path: Path) -> None:
    for place in ("/", "/dev/null", tmp_path / ("long" * 100), tmp_path / "file" / "x", tmp_path / ("y" * 5000)):
        (tmp_path / "file").touch()
        for check in (any_file, new_file):
            with pytest.raises(OutputError), claimed(place, {}, check):
                pass
    assert snapshot(tmp_path) == {"file": b""}


def test_what_fails_in_a_claim_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "deep" / "er" / "out", {}):
        raise ZeroDivisionError
    assert snapshot(tmp_path) == {}


def test_inputs_with_commas_patterns_and_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that a flag means is spared, and the cache's folder of what is named on the Hub."""
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("x")
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    given = {f"{tmp_path}/a.csv, {tmp_path}/b.csv": tmp_path / "b.csv", f"{tmp_path}/*.csv": tmp_path / "a.csv"}
    given |= {"org/name@main": snapshot / "new", "org/name": tmp_path / "hub" / "models--org--name"}
    for source, place in given.items():
        with pytest.raises(OutputError, match="never written to"), claimed(place, {"input": source}, any_file):
            pass
    with claimed(tmp_path / "c.csv", dict.fromkeys(given, None) | {"input": "org/name"}, any_file):
        pass
