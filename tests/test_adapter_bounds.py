"""Numbers that would only fill memory, disk or time are refused or kept to what is possible; lists are lists."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from lowrank import LoraConfig
from lowrank.adapters.combine import combine_adapters
from lowrank.adapters.extract import extract_adapter
from lowrank.adapters.resize import resize_adapter
from lowrank.analysis.inspection import inspect_adapter
from lowrank.analysis.places import natural, places
from lowrank.core.init import Site, find_init
from lowrank.errors import ConfigError
from lowrank.modelfiles import pool
from merge_disk_models import linear_factors, write_adapter, write_base

PATH = "layers.0.q_proj"


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "in", linear_factors(PATH, 6, 4))


def test_a_rank_that_no_change_can_have_is_refused(tmp_path, adapter):
    for wrong in ({"rank": 2_000_000}, {"rank": 5}, {"ranks": {"q_proj": 5}}):
        with pytest.raises(ConfigError, match="more than any change of this adapter can have, which is 4"):
            resize_adapter(adapter, tmp_path / "out", **wrong)
        assert not (tmp_path / "out").exists()
    resize_adapter(adapter, tmp_path / "four", rank=4)
    report = resize_adapter(adapter, tmp_path / "cut", rank=2_000_000, energy=0.999)  # a limit, never reached
    assert report.modules[0].rank <= 4


def test_threads_beyond_what_a_disk_can_use_are_not_started(tmp_path, adapter, monkeypatch):
    started = []
    run = pool.threading.Thread

    def counted(*args, **kwargs):
        started.append(kwargs.get("name"))
        return run(*args, **kwargs)

    monkeypatch.setattr(pool.threading, "Thread", counted)
    base = write_base(tmp_path / "base", {f"{PATH}.weight": (6, 4)}, {})
    lowrank.merge_checkpoint(base, adapter, tmp_path / "merged", threads=100_000)
    assert 0 < len(started) <= 2 * pool.MOST_THREADS  # to write, and to verify


@pytest.mark.parametrize(
    "name", ["pissa_niter_99999999999", "pissa_niter_1001", "pissa_niter_²", "pissa_niter_" + "9" * 5000]
)
def test_iterations_have_a_bound(name):
    with pytest.raises(ConfigError, match="pissa_niter_N with N up to 1000") as caught:
        LoraConfig(init_lora_weights=name)
        find_init(name)
    assert len(str(caught.value)) < 1000
    find_init("pissa_niter_1000")


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_8"])
def test_pissa_holds_at_negative_scales_and_says_where_there_is_none(method):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def start(scale):
        site = Site(6, 4, 4, scale, lambda: weight, weight.device, torch.float32)
        return find_init(method)(site)

    for scale in (2.5, -1.5):
        found = start(scale)
        assert torch.allclose(scale * found.b @ found.a, weight, atol=1e-5)
    with pytest.raises(FloatingPointError, match="scale s of 0"):
        start(0.0)


@pytest.mark.parametrize("prefix", ["\x1b[31m\n", "transformer", "a b.", "..", "é.", ".x."])
def test_a_prefix_is_names_with_dots(tmp_path, prefix):
    base, tuned = (write_base(tmp_path / name, {f"{PATH}.weight": (6, 4)}, {}) for name in ("base", "tuned"))
    with pytest.raises(ConfigError, match="prefix must be names"):
        extract_adapter(base, tuned, tmp_path / "out", rank=1, prefix=prefix)


def test_a_list_of_folders_is_a_list_of_weights_of_one(tmp_path, adapter):
    one = combine_adapters([adapter, str(adapter)], tmp_path / "one")
    other = combine_adapters([(adapter, 1.0), (adapter, 1)], tmp_path / "other")
    assert one.modules == other.modules
    assert (tmp_path / "one" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "other" / "adapter_model.safetensors"
    ).read_bytes()
    for wrong in (0, float("nan"), float("inf"), True, "x", None, 10**400):
        with pytest.raises(ConfigError, match="must be a finite number other than 0"):
            combine_adapters([(adapter, wrong)], tmp_path / "out")
    for nothing in ([], ()):
        with pytest.raises(ConfigError, match="no adapter is given"):
            combine_adapters(nothing, tmp_path / "out")


def test_numbers_in_names_are_numbers_or_words(tmp_path):
    long = "9" * 4301
    assert natural("layers.²")[0] == (-1, "layers.²")
    found = places([f"layers.{long}.q", "layers.².q", "layers.10.q", "layers.2.q"])
    assert [place.layer for place in found.values()] == [None, None, 10, 2]
    assert sorted(["a.10", "a.9", "a"], key=natural) == ["a", "a.9", "a.10"]
    factors = {}
    for name in (long[:400], "²", "3"):
        factors |= linear_factors(f"layers.{name}.q_proj", 6, 4)
    inspection = inspect_adapter(write_adapter(tmp_path / "odd", factors))
    assert [layer.place.layer for layer in inspection.layers].count(3) == 1


def test_a_changed_shape_has_no_norm(tmp_path):
    """Tokens were added: what changed is a shape, and no ‖Δ‖ of 0 is claimed for it."""
    base = write_base(tmp_path / "base", {f"{PATH}.weight": (6, 4), "embed_tokens.weight": (8, 4)}, {})
    tuned = write_base(tmp_path / "tuned", {f"{PATH}.weight": (6, 4), "embed_tokens.weight": (12, 4)}, {})
    tensors = load_file(tuned / "model.safetensors")
    tensors[f"{PATH}.weight"] += 1.0
    save_file(tensors, tuned / "model.safetensors")
    text = str(extract_adapter(base, tuned, tmp_path / "out", rank=1))
    assert "embed_tokens.weight first: its shape changed from [8, 4] to [12, 4]" in text
    assert "‖Δ‖ = 0" not in text
