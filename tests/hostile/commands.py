"""A fuzz target for whole commands: combine, rank, eval, generate, train, data show, plot, estimate; of generate also
talks, of train also what is resumed and what goes on from an adapter.

Every call of the command line ends with status 0 and a sound result, or with status 2, one sentence and nothing half
written; inputs stay as they were; ten seconds and a gigabyte are enough.

    python tests/hostile/commands.py --minutes 10 [--seed 0] [--keep tests/hostile] [--cases N]

A case is a folder with two trained adapters, a run that was stopped, rows in several formats, settings and a model's
config. Damaged are adapters, what their runs keep, rows, settings and that config, by structure and by bytes, and the
values of flags; not the base, which transformers builds. What breaks the promise is kept as a folder `command-HASH`
with its call in line.json, which the test suite calls again.
"""

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import fuzz  # noqa: E402
import readers  # noqa: E402
import running  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from lowrank import cli  # noqa: E402
from lowrank.checkpoint.read import read_adapter  # noqa: E402
from train_models import completion_rows, label_rows, save_llama, write_jsonl  # noqa: E402

Line = list[str]
SAID = "the cat\n\n/clear\nis \x1b[31m red\n"  # to who talks
QUICK = ["--max-length", "32", "--no-cache"]
SMALL = ["--steps", "1", "--batch-size", "2", "--log-every", "1", "--device", "cpu"]
ASKED = ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"]
ROWS = [*ASKED, "rows.txt", "labels.tsv"]
METHODS = ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
ODD = ["", "0", "-1", "2", "0.5", "1e308", "nan", "inf", "9" * 400, "x", ".", "../x", "train.yaml", "a\nb", "\x1b[31m"]
ODD += ["(", "((a|b)+)+!", "{}", "{prompt}", "é", "\udce9", "a=1,b=2", "q_proj[q,v]", "all-linear", "pissa", "text"]
FLAGS = {
    "combine": "--rank --density --seed --adapter",
    "rank": "--energy --budget --rank --targets --layers --sample --most --kind --columns",
    "eval": "--rows --batch-size --beta --metrics --kind --columns --template --too-long --chat-template",
    "generate": "--template --temperature --top-p --system --chat-template --max-new-tokens --seed",
    "train": "--rank --alpha --targets --exclude --layers --dropout --init --bias --modules-to-save --rank-pattern "
    "--alpha-pattern --lr --beta --eval-data --eval-split --eval-rows --metrics --keep --kind --columns --template "
    "--prompt-column --text-column --label-column --train-on --chat-template --too-long --schedule --warmup --clip",
    "data": "--rows --kind --columns --template --prompt-column --train-on --chat-template --too-long",
    "plot": "--x --smoothing",
    "estimate": "--rank --targets --target-parameters --expert-rank --rank-pattern --batch-size --micro-batch "
    "--max-length --dtype --optimizer --quantise --dropout --layers",
}


def make_line(dice: random.Random) -> Line:
    """A sound call, of a command by chance."""
    rows, asked, weight = dice.choice(ROWS), dice.choice(ASKED), dice.choice(["", ":0.5", ":-1"])
    method = dice.choice(METHODS)
    held = asked if rows == "rows.txt" else rows  # of which some are held out
    return dice.choice(
        [
            ["combine", "--adapter", "adapter", "--adapter", f"other{weight}", "--method", method, "--out", "out"]
            + (["--density", "0.5"] if METHODS.index(method) > 2 else []),
            ["rank", "--adapter", dice.choice(["adapter", "other"]), "--out", "out"],
            ["rank", "--model", "base", "--data", rows, *QUICK, "--sample", "2", "--out", "out"],
            [
                "eval",
                "--model",
                "base",
                "--adapter",
                "adapter",
                "--data",
                asked,
                "--rows",
                "3",
                "--json",
                *QUICK,
            ],
            ["generate", "--model", "base", "--adapter", "adapter", "--prompt", "the cat", "--max-new-tokens", "3"],
            ["generate", "--model", "base", "--adapter", "adapter", "--chat", "--max-new-tokens", "3"],
            ["estimate", "--model", dice.choice(["base", "small", "small"]), "--gpu", "T4", "--json"],
            ["train", "--model", "base", "--data", rows, *SMALL, *QUICK, "--init-from", "adapter", "--out", "out"],
            ["train", "--config", "train.yaml", "--model", "base", "--data", held, *SMALL, *QUICK, "--out", "out"],
            ["train", "--resume", "half", "--steps", "3"],
            ["data", "show", "--model", "base", "--data", rows, *QUICK],
            ["plot", "adapter", dice.choice(["other", "adapter/log.jsonl"]), "--out", "out.svg"],
        ]
    )


def make_seeds(folder: Path) -> None:
    """The base, and beside it the folder of a sound case."""
    case = folder / "case"
    case.mkdir(parents=True)
    save_llama(folder / "base")
    (case / "small").mkdir()
    shutil.copy(folder / "base" / "config.json", case / "small")
    rows, labels = completion_rows(8), label_rows(8)
    write_jsonl(case / "rows.jsonl", rows)
    (case / "rows.json").write_text(json.dumps(rows))
    (case / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f'{r["prompt"]},"{r["completion"]}"\n' for r in rows)
    )
    (case / "rows.txt").write_text("".join(f"{row['completion']}\n" for row in rows))
    (case / "labels.tsv").write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in labels))
    with gzip.open(case / "rows.jsonl.gz", "wb") as file:
        file.write((case / "rows.jsonl").read_bytes())
    for name, more in (("adapter", []), ("other", ["--rank-pattern", "q_proj=3", "--rslora"])):
        line = ["train", "--model", "base", "--data", "rows.jsonl", *SMALL, *QUICK, "--rank", "2", "--lr", "0.1", *more]
        status, _, told = call(case, folder / "base", [*line, "--eval-split", "0.3", "--out", name])
        assert status == 0, told
    shutil.copy(case / "adapter" / "train.yaml", case / "train.yaml")
    line = ["train", "--config", "train.yaml", "--model", "base", "--steps", "3", "--save-every", "1", "--out", "half"]
    status, _, told = call(case, folder / "base", [*line, "--keep-checkpoints", "2"])
    assert status == 0, told
    for made in ("adapter_model.safetensors", "adapter_config.json", "lowrank.json", "run.json"):
        (case / "half" / made).unlink()  # as if it had been killed at the end


def make_case(seeds: Path, folder: Path, number: int, seed: int) -> Line:
    """Case `number` of a run in `folder`: a sound call with one to three faults in what it reads, or in itself."""
    dice = random.Random(f"{seed}/{number}")
    shutil.copytree(seeds / "case", folder)
    line = make_line(dice)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        if dice.random() < 0.25:
            line = [*line, dice.choice(FLAGS[line[0]].split()), dice.choice(ODD)]
            continue
        if files := [file for word in line for file in _files(folder / word.partition(":")[0])]:
            _spoil(dice.choice(files), dice)
    return line


def _files(path: Path) -> list[Path]:
    found = [path] if os.path.isfile(path) else sorted(path.rglob("*")) if os.path.isdir(path) else []
    return [file for file in found if file.is_file() and not file.is_symlink()]


def _spoil(path: Path, dice: random.Random) -> None:
    if path.suffix == ".gz" and dice.random() < 0.7:
        with contextlib.suppress(OSError, EOFError, zlib.error):
            inner = path.with_suffix("")
            kept = inner.read_bytes()
            inner.write_bytes(gzip.decompress(path.read_bytes()))
            _spoil(inner, dice)
            path.write_bytes(gzip.compress(inner.read_bytes()))
            inner.write_bytes(kept)
    elif path.suffix in (".jsonl", ".yaml") and dice.random() < 0.7:
        _spoil_value(path, dice)
    else:
        readers.spoil(path, dice)


def _spoil_value(path: Path, dice: random.Random) -> None:
    """Another value, or name, in a line of JSON or in the settings."""
    try:
        lines = path.read_text().splitlines()
        at = dice.randrange(len(lines))
        one: Any = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(lines[at])
        if isinstance(one, dict) and one and dice.random() < 0.6:
            one[dice.choice(list(one))] = dice.choice([*readers.WRONG, *ODD, "word " * 3000])
        else:
            one = fuzz.mutated(one, dice)
        text = yaml.safe_dump(one) if path.suffix == ".yaml" else json.dumps(one)
    except (ValueError, RecursionError, yaml.YAMLError):
        return readers.spoil(path, dice)
    with contextlib.suppress(ValueError):  # half a character, which no file holds
        path.write_text(text if path.suffix == ".yaml" else "\n".join([*lines[:at], text, *lines[at + 1 :]]) + "\n")
    return None


def call(folder: Path, base: Path, line: Line) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a call in `folder`, where the base is called `base`."""
    out, err, asked = io.StringIO(), io.StringIO(), sys.stdin
    (folder / "base").symlink_to(base)
    sys.stdin = io.StringIO(SAID)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(line)
    finally:
        sys.stdin = asked
        (folder / "base").unlink()
    return status, out.getvalue(), err.getvalue()


def broken_promise(folder: Path, base: Path, line: Line) -> str | None:
    """Make the call; what is wrong with how that went, or None."""
    before = running.snapshot(folder)
    try:
        with warnings.catch_warnings(), readers.bounded():
            warnings.simplefilter("ignore")
            status, told, complained = call(folder, base, line)
        if status == 0:
            CHECKS[line[0]](folder, line, told)
            made = {PLACES.get(line[0], "out"), "half"} if "--resume" in line else {PLACES.get(line[0], "out")}
        else:
            assert status == 2, complained
            said = [text for text in complained.splitlines() if text.startswith("lowrank: error: ")]
            assert len(said) == 1 and len(said[0]) < 3000 and said[0].isprintable(), complained
            made = {f"{run}/{name}" for run in ("out", "half") for name in ("train.yaml", "log.jsonl")}
        after = running.snapshot(folder)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        strange = [name for name in changed if name not in made and name.partition("/")[0] not in made]
        assert not strange, f"changed, or left: {sorted(strange)}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    return None


def _sound_adapter(folder: Path, line: Line, _told: str) -> None:
    for path, pair in read_adapter(folder / ("half" if "--resume" in line else "out")).low_rank.items():
        assert all(bool(torch.isfinite(tensor).all()) for tensor in pair.values()), path


def _sound_ranks(folder: Path, _line: Line, _told: str) -> None:
    assert yaml.safe_load((folder / "out").read_text())["rank"] >= 1


def _sound_numbers(_folder: Path, _line: Line, told: str) -> None:
    def none(name: str) -> None:
        raise AssertionError(f"{name} is no number")

    json.loads(told, parse_constant=none)


def _sound_picture(folder: Path, _line: Line, _told: str) -> None:
    assert (folder / "out.svg").read_text().rstrip().endswith("</svg>")


def _printable(_folder: Path, _line: Line, told: str) -> None:
    assert all(character.isprintable() or character in "\n\t" for character in told)


PLACES = {"plot": "out.svg"}
CHECKS: dict[str, Callable[[Path, Line, str], None]] = {
    "combine": _sound_adapter, "train": _sound_adapter, "rank": _sound_ranks, "eval": _sound_numbers,
    "plot": _sound_picture, "data": _printable, "generate": _printable, "estimate": _sound_numbers,
}  # fmt: skip


def main() -> int:
    """Run for a while; the number of kept cases is the exit status, at most 100."""
    asked = running.options(__doc__)
    with tempfile.TemporaryDirectory(dir=running.MEMORY_DISK) as name:
        make_seeds(seeds := Path(name) / "seeds")

        def case(place: Path, number: int) -> tuple[str | None, running.Keep]:
            line = make_case(seeds, folder := place / "case", number, asked.seed)
            before = shutil.copytree(folder, place / "kept", symlinks=True)
            fault = broken_promise(folder, seeds / "base", line)
            return fault and f"{line}\n{fault}", lambda where: _keep(before, where, line)

        return running.search(asked, case)


def _keep(folder: Path, where: Path, line: Line) -> Path:
    target = running.kept(folder, where, "command", more=str(line))
    named = {word.partition(":")[0].partition("/")[0] for word in line} | {"rows.jsonl"}  # which settings may name
    for path in target.iterdir():
        if path.name not in named:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (target / "line.json").write_text(json.dumps(line) + "\n")
    return target


if __name__ == "__main__":
    sys.exit(main())
