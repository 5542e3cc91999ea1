"""The programs in docs/trainer.md, docs/accelerate.md and docs/trl.md run as they stand."""

import re
from pathlib import Path

import pytest

from checkpoint_models import contents, llama, word_tokenizer

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("page", ["trainer", "accelerate", "trl"])
def test_the_program_of_the_page_runs(page, tmp_path, monkeypatch):
    if page == "trl":
        pytest.importorskip("trl", reason="TRL is no dependency: pip install -e '.[trl]' runs this test")
    llama().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    exec(compile(program, page, "exec"), {})
    files = set(contents(tmp_path / "adapter"))
    assert {"adapter_config.json", "adapter_model.safetensors", "lowrank.json"} <= files
    assert "config.json" not in files and "model.safetensors" not in files
