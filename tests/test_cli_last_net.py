"""Nothing that goes wrong ends on the user's screen as a traceback, a forged line or a sign that cannot be encoded."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

from lowrank import cli
from lowrank.errors import CheckpointError, LowrankWarning, printable


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """A command that ends in the error it is given; temporary files go to tmp_path."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("LOWRANK_DEBUG", raising=False)

    def command(error):
        def fail(_arguments):
            raise error

        monkeypatch.setattr(cli, "_answer", fail)
        return cli.main(["train"])

    return command


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division by zero"), RecursionError("deep"), RuntimeError("a\nb\x1b[2J"), TypeError()]
)
def test_what_nobody_foresaw_is_a_sentence_and_a_file(failing, capsys, tmp_path, error):
    assert failing(error) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err[:-1].isprintable()
    assert captured.err.startswith(
        f"lowrank: error: this failed in a way that was not foreseen ({type(error).__name__}"
    )
    (kept,) = tmp_path.iterdir()
    assert str(kept) in captured.err
    assert "Traceback" in kept.read_text() and f"{type(error).__name__}" in kept.read_text()


def test_the_traceback_is_shown_on_request(failing, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_DEBUG", "1")
    assert failing(ZeroDivisionError("no")) == 1
    assert "Traceback" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_file_is_said(failing, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert failing(ZeroDivisionError("no")) == 1
    assert "LOWRANK_DEBUG=1 shows it" in capsys.readouterr().err


def test_no_memory_is_a_sentence_of_its_own(failing, capsys):
    assert failing(MemoryError()) == 1
    assert capsys.readouterr().err == "lowrank: error: the memory does not suffice for this\n"


def test_names_of_others_forge_no_line_and_command_no_terminal(failing, capsys):
    assert failing(CheckpointError("a\nlowrank: error: fake \x1b]0;owned\x07 \u202egnp.exe \ud83d ‖ΔW‖")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable()
    assert said == (r"lowrank: error: a\nlowrank: error: fake \x1b]0;owned\x07 \u202egnp.exe \ud83d ‖ΔW‖" + "\n")


def test_messages_are_of_bounded_length(failing, capsys, monkeypatch):
    assert failing(CheckpointError("x" * 200_000)) == 2
    assert len(capsys.readouterr().err) < 430
    monkeypatch.setattr(cli, "_answer", lambda _: warnings.warn("a\nb" * 9000, LowrankWarning, stacklevel=1))
    assert cli.main(["train"]) == 0
    said = capsys.readouterr().err
    assert len(said) < 430 and said.count("\n") == 1


def test_printable_leaves_what_can_be_read():
    for text in ("q_proj", "‖ΔW‖ ≤ 3·σ₁", "模型", "a b"):
        assert printable(text) == text
    assert printable("a\tb\nc", keep="\n") == "a\\tb\nc"


SIGNS = """
import sys
from lowrank.cli import main
base, adapter, folder = sys.argv[1:]
calls = [
    ["inspect", adapter, "--model", base],
    ["merge", "--model", base, "--adapter", adapter, "--out", folder + "/merged"],
    ["combine", "--adapter", adapter, "--adapter", adapter, "--out", folder + "/combined"],
    ["resize", "--adapter", adapter, "--rank", "1", "--out", folder + "/resized"],
    ["convert", "--source", adapter, "--to", "loralib", "--out", folder + "/lora.safetensors"],
    ["eval", "--data", "x.jsonl", "--model", "\\u2016\\u0394W\\udcff"],
]
for call in calls:
    print(main(call), file=sys.stderr)
"""


def make_pair(folder):
    """A base and an adapter of a few numbers."""
    torch.manual_seed(0)
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    save_file({"model.q_proj.weight": torch.randn(6, 4)}, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    pair = {"A": torch.randn(2, 4), "B": torch.randn(6, 2)}
    tensors = {f"base_model.model.model.q_proj.lora_{role}.weight": tensor for role, tensor in pair.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "LANG=C"])
def test_no_encoding_of_the_screen_stops_a_command(tmp_path, encoding):
    """The work is done when its figures are told: a stdout that has no ‖ΔW‖ gets ||dW||."""
    make_pair(tmp_path)
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = os.environ | (plain if encoding == "LANG=C" else {"PYTHONIOENCODING": encoding})
    places = [str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", SIGNS, *places], capture_output=True, env=env, check=False)
    statuses = re.findall(rb"^\d$", done.stderr, re.MULTILINE)
    assert statuses == [b"0"] * 5 + [b"2"], done.stderr.decode("latin-1")
    assert b"||dW||" in done.stdout
