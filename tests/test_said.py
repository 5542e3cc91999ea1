"""Words of files on standard output: printable, short, each in its own line, on a terminal and by a pipe."""

import json
import re
import sys

import pytest
import torch

import lowrank
from checkpoint_models import llama
from lowrank import LoraConfig
from lowrank.cli import main
from lowrank.cli.say import say, say_part, styled
from lowrank.errors import short, some

EVIL = "x\x1b]0;pwn\x07\nlowrank: error: fake\u202e"


def test_names_in_sentences_are_printable_and_few():
    assert short(EVIL) == "x\\x1b]0;pwn\\x07\\nlowrank: error: fake\\u202e"
    assert some([EVIL] * 112).endswith(" and 109 more") and some([EVIL]).isprintable()


def test_the_printer_keeps_our_lines_and_nothing_that_a_terminal_obeys(capsys, monkeypatch):
    say("two\nlines\t‖ΔW‖", "\x1b[31mred\x9b2J")
    assert capsys.readouterr().out == "two\nlines\t‖ΔW‖\n\\x1b[31mred\\x9b2J\n"
    assert styled("[bold]\x1b[2J").plain == "[bold]\\x1b[2J"
    say_part("a\x1b[2J")
    assert capsys.readouterr().out == "a\x1b[2J"  # by a pipe: the model's own text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    say_part("a\x1b[2J")
    assert capsys.readouterr().out == "a\\x1b[2J"


@pytest.fixture
def hostile(tmp_path):
    """An adapter whose config has words that command a terminal, at every place where words may stand; its base."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    lowrank.save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text()) | {f"{EVIL}{n}": 1 for n in range(50)}
    config |= {"base_model_name_or_path": f"org/{EVIL}" + "y" * 5000, "revision": EVIL, "task_type": EVIL}
    path.write_text(json.dumps(config))
    return tmp_path


LINES = [
    ["inspect", "a"],
    ["inspect", "a", "--model", "base"],
    ["inspect", "a", "--html", "page.html"],
    ["inspect", "a", "--against", "other"],
    ["merge", "--model", "base", "--adapter", "a", "--out", "out"],
    ["combine", "--adapter", "a", "--adapter", "other", "--out", "out"],
    ["resize", "--adapter", "a", "--rank", "1", "--out", "out"],
    ["rank", "--adapter", "a", "--budget", "200"],
    *(["convert", "--source", "a", "--to", to, "--model", "base", "--out", "out"] for to in ("mlx", "gguf", "bin")),
]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_no_command_lets_a_file_speak_to_the_terminal(hostile, monkeypatch, capsys, line):
    monkeypatch.chdir(hostile)
    assert main(["resize", "--adapter", "a", "--rank", "1", "--out", "other"]) == 0
    assert main(line) in (0, 2)
    told = capsys.readouterr()
    for text in (told.out, told.err):
        assert all(sign.isprintable() or sign in "\n\t" for sign in text)
        assert not any(said.startswith("lowrank: error: fake") for said in text.splitlines())
        assert len(max(text.splitlines(), key=len, default="")) < 2100
    if "page.html" in line:
        page = (hostile / "page.html").read_text()
        assert "pwn" in page and all(sign.isprintable() or sign in "\n\t" for sign in page)


def test_the_report_of_a_load_is_a_line_for_each_finding(hostile):
    report = lowrank.load_adapter(llama(), hostile / "a")
    lines = str(report).splitlines()
    assert all(line.isprintable() and len(line) < 2100 for line in lines) and re.search(r"and 4\d more", str(report))
