"""`lowrank doctor`: a wrong call is told before the machine is measured, which takes many seconds."""

import pytest

from lowrank.cli import main
from train_models import save_llama


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "base", "--targets", "q_porj"], "q_porj"),
        (["--model", "base", "--rank", "0"], "rank"),
        (["--model", "base", "--tokens", "-1"], "tokens"),
        (["--model", "base", "--dtype", "int3"], "dtype"),
        (["--rank", "4"], "--rank is about the layers of a model: give --model too"),
        (["more"], "more"),
    ],
)
def test_a_wrong_call_is_told_before_anything_is_measured(more, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "base")
    monkeypatch.setattr("lowrank.study.doctor.describe_machine", lambda: pytest.fail("the machine was measured"))
    capsys.readouterr()  # transformers draws a bar where it saves
    assert main(["doctor", *more]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("lowrank: error: ") and err.count("\n") == 1 and said in err
