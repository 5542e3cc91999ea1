"""Tools over quantised bases, from files alone: inspect, extract, combine and resize see the matrix training saw."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowrank
import quantised_models
from lowrank.analysis import inspect_adapter
from lowrank.checkpoint.read import read_adapter
from lowrank.cli import main
from lowrank.merge.onto import dequantise_rest
from quantised_models import adapted, load
from test_merge_as_trained import trained

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module", params=quantised_models.CHECKPOINTS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised checkpoint under `base`, and the same with its matrices as numbers under `plain`."""
    root = quantised_models.checkpoint(tmp_path_factory.mktemp("quantised"), request.param)
    model = load(root / "base")
    dequantise_rest(model, torch.float32)
    model.float().save_pretrained(root / "plain")
    return root


def test_inspect_measures_what_it_does_beside_the_dequantised_base(base, tmp_path, capsys):
    adapted(base / "base", tmp_path / "adapter", target_modules=TARGETS)
    got, wanted = (inspect_adapter(tmp_path / "adapter", base / name) for name in ("base", "plain"))
    assert len(got.layers) == 4 and [layer.base for layer in got.layers] == [layer.base for layer in wanted.layers]
    assert main(["inspect", str(tmp_path / "adapter"), "--model", str(base / "base"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 4


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """{module: ΔW} of an adapter's files."""
    files = read_adapter(folder)
    pairs = {path: files.pair(path) for path in files.low_rank}
    return {path: files.config.scale(path) * b @ a for path, (a, b) in pairs.items()}


def test_extract_finds_again_what_was_merged_onto_16bit(base, tmp_path):
    adapted(base / "base", tmp_path / "adapter", target_modules=TARGETS)
    lowrank.merge_checkpoint(base / "base", tmp_path / "adapter", tmp_path / "tuned", dtype="float32")
    report = lowrank.extract_adapter(base / "base", tmp_path / "tuned", tmp_path / "found", rank=4, exact=True)
    assert report.kept > 0.999 and len(report.modules) == 4
    got, wanted = deltas(tmp_path / "found"), deltas(tmp_path / "adapter")
    assert got.keys() == wanted.keys()
    for path, delta in wanted.items():
        torch.testing.assert_close(got[path], delta, rtol=0, atol=1e-4 * float(delta.norm()))


def test_extract_reads_a_tuned_model_that_is_quantised_too(base, tmp_path):
    adapted(base / "base", tmp_path / "adapter", target_modules=TARGETS, size=0.2)
    lowrank.merge_checkpoint(base / "base", tmp_path / "adapter", tmp_path / "tuned", onto="quantised", anyway=True)
    report = lowrank.extract_adapter(base / "base", tmp_path / "tuned", tmp_path / "found", rank=4)
    assert {module.path for module in report.modules} == deltas(tmp_path / "adapter").keys()


def test_combine_and_resize_keep_what_the_adapters_were_trained_over(tmp_path):
    for name in ("one", "two"):
        trained(tmp_path, "nf4 double", torch.float32, name=name)
    lowrank.combine_adapters([(tmp_path / "one", 0.5), (tmp_path / "two", 0.5)], tmp_path / "both", method="cat")
    lowrank.resize_adapter(tmp_path / "both", tmp_path / "wider", rank=12)
    stored = [json.loads((tmp_path / name / "lowrank.json").read_text())["stored"] for name in ("one", "both", "wider")]
    assert stored[0] == stored[1] == stored[2] and len(stored[0]["rest"]) == 10
    report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "wider", tmp_path / "out", dtype="float32")
    assert "14 weights were quantised again" in report.notes[0]
    pairs = [(tmp_path / "one", 0.5), (tmp_path / "two", 0.5)]
    lowrank.merge_checkpoint(tmp_path / "base", pairs, tmp_path / "wanted", dtype="float32")
    got, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wanted"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)


def test_combine_says_that_adapters_of_two_forms_have_no_base_in_common(tmp_path):
    for name, scheme in (("one", "nf4"), ("two", "int8")):
        trained(tmp_path, scheme, torch.float32, name=name)
    report = lowrank.combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert "trained over different bases, held in NF4 and in int8: none is kept" in str(report)
    assert "stored" not in json.loads((tmp_path / "both" / "lowrank.json").read_text())


def test_resize_keeps_the_base_that_loftq_moved(tmp_path):
    trained(tmp_path, "nf4", torch.float32, rounds=2)
    lowrank.resize_adapter(tmp_path / "adapter", tmp_path / "wider", rank=6)
    merged: list[dict[str, Any]] = []
    for name in ("adapter", "wider"):
        report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-out")
        assert "moved by LoftQ" in report.notes[0]
        merged.append(load_file(tmp_path / f"{name}-out" / "model.safetensors"))
    for name, tensor in merged[0].items():
        torch.testing.assert_close(merged[1][name], tensor, rtol=0, atol=0.01)
