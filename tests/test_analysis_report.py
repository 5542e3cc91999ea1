"""The report and its words: what they say, that they say it of the right module, and that the file is safe to open."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint_models as models
from lowrank.analysis import Inspection, inspect_adapter
from lowrank.analysis.figures.scale import LEVELS, Scale
from lowrank.analysis.report import render, write_report
from lowrank.analysis.summary import summary
from lowrank.analysis.words import number, percent, span, spans
from lowrank.errors import LowrankError
from merge_disk_models import save_adapter, save_base

WEIGHTS = "adapter_model.safetensors"
VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    folder = tmp_path_factory.mktemp("report")
    model = models.llama(layers=3)
    base = save_base(model, folder / "base")
    one = save_adapter(model, folder / "one", r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"])
    other = save_adapter(model, folder / "other", seed=2, r=3, target_modules=["q_proj", "up_proj"])
    return inspect_adapter(one, base, other)


class Page(HTMLParser):
    """Every tag closed in order; what is in it, by kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(inspection: Inspection) -> None:
    text = render(inspection)
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "image", "use"})
    assert not any(
        name in attributes for _, attributes in page.tags for name in ("src", "href", "xlink:href", "onload")
    )
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "nan" not in re.sub(r"<[^>]*>", " ", text).lower().split()
    for drawn in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawn)
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_words_come_first_and_every_figure_is_explained(inspection: Inspection) -> None:
    text = render(inspection)
    assert text.index('<ul class="words">') < text.index("<svg")
    figures = re.findall(r"<figure.*?</figure>|<details>.*?</details>", text, re.DOTALL)
    assert len(figures) == 11
    for figure in figures:
        how = re.search(r'<p class="how">(.+?)</p>', figure)
        assert how is not None and len(how[1]) > 40
        assert "<svg" in figure


def test_every_module_has_a_cell_and_a_row(inspection: Inspection) -> None:
    text = render(inspection)
    for layer in inspection.layers:
        assert f"<title>{layer.measure.path}: {number(layer.base.relative)}</title>" in text
        assert f"<td>{layer.measure.path}</td>" in text


def test_the_same_figures_give_the_same_bytes(inspection: Inspection) -> None:
    assert render(inspection) == render(inspection)


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    adapter = save_adapter(models.llama(), tmp_path / "a<i>&\"'", r=2, target_modules=["q_proj"])
    evil = "<script>alert(1)</script>"
    tensors = load_file(adapter / WEIGHTS)
    save_file({key.replace("q_proj", evil): tensor for key, tensor in tensors.items()}, adapter / WEIGHTS)
    text = render(inspect_adapter(adapter, against=adapter))
    assert "alert(1)" in text
    assert not {tag for tag, _ in Page(text).tags} & {"script", "i"}


def test_a_report_is_written_whole_or_not_at_all(
    inspection: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "report.html"
    place.write_text("the old one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(LowrankError, match="cannot be written \\(No space left on device\\)"):
            write_report(inspection, place)
    assert place.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [place]
    write_report(inspection, place)
    assert place.read_text() == render(inspection)


def test_an_idle_adapter_has_a_report_too(tmp_path: Path) -> None:
    model = models.llama()
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(model, tmp_path / "a", target_modules=["q_proj"])
    busy = save_adapter(model, tmp_path / "b", target_modules=["q_proj"])
    tensors = load_file(adapter / WEIGHTS)
    save_file({key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tensors.items()}, adapter / WEIGHTS)
    inspection = inspect_adapter(adapter, base, busy)
    assert "This adapter changes nothing: every ΔW is zero." in summary(inspection)
    assert "one of the two changes is zero, so there is nothing to compare" in " ".join(summary(inspection))
    assert "<svg" not in render(inspection)
    Page(render(inspection))
    partly = inspect_adapter(busy, base, adapter)
    Page(render(partly))
    assert "Beside the base" in render(partly) and "Beside the other adapter" not in render(partly)


def rewrite(adapter: Path, strength: dict[str, float]) -> None:
    """Every ΔW becomes rank 2, and as strong as the first word found in its name says."""
    tensors = load_file(adapter / WEIGHTS)
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor[:, 2:] = 0
            factor = next((value for word, value in strength.items() if word in key), 1.0)
            tensor.mul_(factor / tensor.norm())
        else:
            tensor.copy_(torch.eye(*tensor.shape))
    save_file(tensors, adapter / WEIGHTS)


def test_the_words_name_rank_and_place(tmp_path: Path) -> None:
    adapter = save_adapter(
        models.llama(layers=9), tmp_path / "a", r=8, lora_alpha=4, target_modules=["q_proj", "v_proj"]
    )
    rewrite(
        adapter, {"layers.6.self_attn.v_proj": 20.0, "layers.7.self_attn.v_proj": 30.0, "layers.2.self_attn.q": 25.0}
    )
    sentences = summary(inspect_adapter(adapter))
    assert sentences[0].startswith("Rank 8 was given to 18 modules (q_proj, v_proj) at scale 0.5: ")
    assert "rank 2 everywhere would keep 100 % of it" in sentences[1]
    assert sentences[-1].startswith("Changed most, by ‖ΔW‖: v_proj of layers 6–7, q_proj of layer 2 (10 to 15, ")


def test_the_words_say_that_no_rank_is_idle(tmp_path: Path) -> None:
    adapter = save_adapter(models.llama(), tmp_path / "a", r=4, target_modules=["q_proj"])
    tensors = load_file(adapter / WEIGHTS)
    save_file({key: torch.eye(*tensor.shape) for key, tensor in tensors.items()}, adapter / WEIGHTS)
    sentences = summary(inspect_adapter(adapter))
    assert "sits in 4.0 directions on average (4); half the rank would keep 50 %" in sentences[1]
    assert "effective rank (by entropy) is 4.0 on average" in sentences[2]


def test_rank_one(tmp_path: Path) -> None:
    adapter = save_adapter(models.llama(), tmp_path / "a", r=1, lora_alpha=3, target_modules=["q_proj"])
    inspection = inspect_adapter(adapter, against=adapter)
    assert "there is no smaller rank" in summary(inspection)[1]
    Page(render(inspection))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"),
        (3.0, "3"),
        (0.12345, "0.123"),
        (-0.5, "-0.5"),
        (1234.5, "1,234"),
        (2e-7, "2.00e-07"),
        (9.9e8, "9.90e+08"),
    ],
)
def test_numbers(value: float, words: str) -> None:
    assert number(value) == words


def test_ranges() -> None:
    assert (span([3, 1, 2]), span([2, 2])) == ("1 to 3", "2")
    assert spans([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert (percent(0.973), percent(0.0042), percent(0)) == ("97 %", "0.42 %", "0 %")


def test_scales_keep_to_their_levels() -> None:
    scale = Scale(0.0, 9.0)
    assert [scale.level(value) for value in (-1, 0, 0.99, 1, 8.99, 9, 100)] == [0, 0, 0, 1, 8, 8, 8]
    assert Scale(0.0, 0.0).level(0.0) == 0
    assert Scale(-1.0, 1.0, diverging=True).level(0.0) == LEVELS // 2
