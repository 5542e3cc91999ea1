"""The command line: exit statuses, sentences on stderr, help, streams. In one process but where that cannot be."""

import json
import os
import re
import subprocess
import sys

import pytest

from lowrank import cli
from train_models import completion_rows, save_llama, write_jsonl

SENTENCE = "lowrank: error: "


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("cli")
    save_llama(home / "llama")
    write_jsonl(home / "skill.jsonl", completion_rows(30))
    write_jsonl(home / "odd.jsonl", [{"mr": "a", "ref": "b"}])
    return home


@pytest.fixture
def here(home, monkeypatch):
    """The folder of the models and data is the working folder, so messages are short and known."""
    monkeypatch.chdir(home)
    return home


def call(capsys, line):
    """(status, stdout, stderr) of one command line."""
    status = cli.main(line.split())
    captured = capsys.readouterr()
    return status, captured.out, captured.err


WRONG = [
    ("trian", 'Unknown command "trian". Did you mean "train"?'),
    ("train --rnk 4", "Unknown option: --rnk. Did you mean --rank?"),
    ("train --rank", "--rank requires an argument"),
    ("train data.jsonl", "data.jsonl: every value needs its flag in front"),
    ("train --lr fast", "--lr: input should be a valid number"),
    ("train --lr 1 --lr 2", "--lr specified multiple times"),
    ("train --data skill.jsonl", "--model is needed"),
    ("train --model none --data skill.jsonl --out x", "model none: there is no such folder"),
    ("train --model llama --data none.jsonl --out x", "none.jsonl: No such file"),
    (
        "train --model llama --data odd.jsonl --out x",
        "odd.jsonl:1: none of messages, conversations, prompt + completion",
    ),
    ("train --model llama --data odd.jsonl --prompt-column MR --out x", "no column 'MR'"),
    ("train --model llama --data skill.jsonl --out .", "--out .: this folder already holds"),
    ("train --model llama --data skill.jsonl --out x --rank 0", "r must be a whole number of at least 1, not 0"),
    ("train --model llama --data skill.jsonl --out x --targets q_prj", "'q_prj' matches no module"),
    ("train --config none.yaml", "config none.yaml: No such file"),
    ("eval --model llama", "--data is needed"),
    ("eval --model llama --data skill.jsonl --adapter none", "none"),
    ("generate --model llama", "--prompt is needed"),
    ("generate --model llama --prompt cat --top-p 2", "--top-p"),
    ("generate --model llama --prompt cat --template x", "{prompt} once"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_call_is_one_sentence_and_status_2(here, capsys, line, message):
    before = sorted(os.listdir())
    status, out, err = call(capsys, line)
    assert status == 2
    assert err.startswith(SENTENCE)
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(os.listdir()) == before


def test_train_eval_generate(here, capsys, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "c.yaml").write_text("targets: all-linear\nlr: 2e-2\nsteps: 99\n")
    line = f"train --config {tmp_path}/c.yaml --model llama --data skill.jsonl --out {out} --epochs 20 --batch-size 16"
    status = cli.main([*line.split(), "--eval-split", "0.1", "--template", "{prompt} ->", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert status == 0
    assert "trained parameters" in shown
    assert "step 40/40" in shown
    assert f"saved to {out}" in shown

    evaluation = f"eval --model llama --adapter {out} --data skill.jsonl --device cpu"
    status, shown, _ = call(capsys, f"{evaluation} --rows 20 --json")
    figures = json.loads(shown)
    assert (status, figures["rows"], figures["kind"]) == (0, 20, "completion")
    assert figures["loss"] < 1.0
    status, shown, _ = call(capsys, evaluation)
    assert "loss:" in shown
    assert "rows:         30" in shown

    asked = f"generate --model llama --adapter {out} --device cpu --prompt"
    assert cli.main([*asked.split(), "what is the hat blue ?"]) == 0
    assert capsys.readouterr().out == "the blue hat\n"


def test_help(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0
    for name, text in cli.COMMANDS.items():
        assert f" {name} " in out
        assert text[:30] in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(capsys, name):
    status, out, _ = call(capsys, f"{name} --help")
    assert status == 0
    assert cli.COMMANDS[name][:30] in out
    assert f"lowrank {name}" in re.split(r"\nExamples?:", out)[1]


def test_version(capsys):
    import lowrank

    assert call(capsys, "--version")[:2] == (0, f"{lowrank.__version__}\n")


def test_interrupted(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_answer", interrupt)
    assert call(capsys, "train") == (130, "", "lowrank: interrupted\n")


def test_disk_full_is_a_sentence(monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device", "log.jsonl")

    monkeypatch.setattr(cli, "_answer", full)
    assert call(capsys, "train") == (2, "", "lowrank: error: log.jsonl: No space left on device\n")


def test_our_warnings_are_lines_and_others_stay(monkeypatch, capsys):
    import warnings

    from lowrank.errors import LowrankWarning

    def warn(_):
        for _ in range(2):
            warnings.warn("watch out", LowrankWarning, stacklevel=1)

    monkeypatch.setattr(cli, "_answer", warn)
    assert call(capsys, "train") == (0, "", "lowrank: warning: watch out\n" * 2)


def test_help_imports_no_torch_and_a_closed_pipe_is_quiet():
    code = """
import sys
from lowrank.cli import main
assert main(["--help"]) == 0 and main(["train", "--help"]) == 0
loaded = {"torch", "transformers", "matplotlib", "pyarrow", "peft"} & set(sys.modules)
assert not loaded, loaded
import os
read, write = os.pipe()
os.dup2(write, 1)
os.close(read), os.close(write)
from lowrank import cli
cli._answer = lambda _: print("a line for nobody")
sys.exit(main(["eval"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lowrank", "no-such"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(SENTENCE)
