"""Bad input: one clear sentence each, nothing under the final name, nothing left beside it, no source touched."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowrank.checkpoint import outputs
from lowrank.errors import CheckpointError, ConfigError, LowrankError, MergeError, OutputError
from lowrank.files.safetensors import build_layout
from lowrank.merge.disk import merge_checkpoint
from merge_disk_models import embedding_factors, linear_factors, pair, write_adapter, write_base

Q = "layers.0.q_proj"
SHAPES = {f"{Q}.weight": (6, 4), "layers.0.k_proj.weight": (6, 4), "norm.weight": (6,)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", SHAPES, {"model_type": "llama"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", linear_factors(Q, 6, 4))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} if folder.is_dir() else {}


def refused(error: type[LowrankError], match: str, base: Path, adapter: Any, out: Path, **options: Any) -> str:
    """The sentence; nothing may be written, and no source changed."""
    before, parent = bytes_of(base), set(out.parent.iterdir()) if out.parent.is_dir() else set()
    with pytest.raises(error, match=match) as caught:
        merge_checkpoint(base, adapter, out, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 800
    assert bytes_of(base) == before
    assert (set(out.parent.iterdir()) if out.parent.is_dir() else set()) == parent
    return text


def shard(base: Path, tensors: dict[str, dict[str, torch.Tensor]], index: dict[str, Any] | None = None) -> None:
    """In place: a sharded checkpoint of these files."""
    (base / "model.safetensors").unlink()
    for name, content in tensors.items():
        save_file(content, base / name)
    table = {key: name for name, content in tensors.items() for key in content}
    content = {"metadata": {}, "weight_map": table} if index is None else index
    (base / "model.safetensors.index.json").write_text(json.dumps(content))


ONE, TWO = {f"{Q}.weight": torch.ones(6, 4)}, {"norm.weight": torch.ones(6)}
A, B = "model-1.safetensors", "model-2.safetensors"


def cut(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-5])


def cut_in_header(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:40])


def not_finite(base: Path) -> None:
    content = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    content[f"{Q}.weight"][2, 3] = float("nan")
    save_file(content, base / "model.safetensors")


def quantised(base: Path) -> None:
    layout = build_layout([(f"{Q}.weight", "F8_E4M3", (6, 4))], None)
    (base / "model.safetensors").write_bytes(layout.header + bytes(24))


def link_out(base: Path) -> None:
    elsewhere = base.parent / "elsewhere.safetensors"
    shutil.move(base / "model.safetensors", elsewhere)
    (base / "model.safetensors").symlink_to(elsewhere)


def link_side_file_out(base: Path) -> None:
    (base.parent / "secret").write_text("x")
    (base / "tokenizer.json").symlink_to(base.parent / "secret")


def pickled(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def missing_file(base: Path) -> None:
    shard(base, {A: ONE, B: TWO})
    (base / B).unlink()


def in_two_files(base: Path) -> None:
    shard(base, {A: ONE, B: ONE | TWO}, {"weight_map": {f"{Q}.weight": A, "norm.weight": B}})


def wrong_place(base: Path) -> None:
    shard(base, {A: ONE, B: TWO}, {"weight_map": {f"{Q}.weight": B, "norm.weight": B, "x": A}})


def path_in_index(base: Path) -> None:
    shard(base, {A: ONE}, {"weight_map": {f"{Q}.weight": "../elsewhere.safetensors"}})


def no_weight_map(base: Path) -> None:
    shard(base, {A: ONE}, {"weight_map": {"a": 3}})


def broken_index(base: Path) -> None:
    shard(base, {A: ONE})
    (base / "model.safetensors.index.json").write_text("{")


def two_models(base: Path) -> None:
    (base / "model.safetensors").rename(base / "x.safetensors")
    save_file(ONE, base / "y.safetensors")


def broken_config(base: Path) -> None:
    (base / "config.json").write_text('{"a": ')


def config_no_object(base: Path) -> None:
    (base / "config.json").write_text("[1]")


def no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def a_folder_for_a_file(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").mkdir()


def an_adapter(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "adapter_config.json").write_text("{}")


BASES: dict[Callable[[Path], None], str] = {
    cut: "5 bytes too short",
    cut_in_header: "ends inside its header",
    not_finite: r"q_proj.weight of the base holds values that are not finite",
    quantised: "stored as F8_E4M3, a form that is not read here",
    link_out: "is a link out of the model's folder",
    link_side_file_out: "is a link out of the model's folder",
    pickled: r"only as pickles \(pytorch_model.bin\).*lowrank convert",
    missing_file: rf"names {B}, which is not there",
    in_two_files: rf"is in {A} and again in {B}",
    wrong_place: "in a file that does not hold it",
    path_in_index: "is no file of its folder",
    no_weight_map: "no weight_map",
    broken_index: "not valid JSON",
    two_models: "holds several models",
    broken_config: "not valid JSON",
    config_no_object: "no JSON object",
    no_weights: "holds no .*safetensors file",
    a_folder_for_a_file: "is no file",
    an_adapter: "is an adapter, not a base model",
}


@pytest.mark.parametrize("damage", BASES, ids=lambda damage: damage.__name__)
def test_bad_bases(damage: Callable[[Path], None], base: Path, adapter: Path, tmp_path: Path) -> None:
    damage(base)
    refused(LowrankError, BASES[damage], base, adapter, tmp_path / "out")


def test_no_base(adapter: Path, tmp_path: Path) -> None:
    refused(CheckpointError, "no model at", tmp_path / "nothing", adapter, tmp_path / "out")


def factors(d: int = 6, k: int = 4, r: int = 2) -> dict[str, torch.Tensor]:
    a, b = pair(d, k, r=r)
    return {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}


def with_nan() -> dict[str, torch.Tensor]:
    content = factors()
    content[f"{Q}.lora_B.weight"][1, 1] = float("inf")
    return content


ADAPTERS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "another shape": (factors(7, 4), {}, r"do not fit the base's tensor of shape \[6, 4\]"),
    "another rank": (factors(r=3), {}, "rank|fit"),
    "not finite": (with_nan(), {}, "not finite"),
    "names nothing": (linear_factors("blocks.0.w", 6, 4), {}, "is nowhere in the base"),
    "an embedding on a linear": (embedding_factors("norm", 6, 4), {}, "do not fit"),
    "a copy of another shape": (
        factors() | {"layers.0.k_proj.weight": torch.ones(7, 4)},
        {"modules_to_save": ["k_proj"]},
        "shape .* resize",
    ),
    "a copy that is not finite": (
        factors() | {"norm.weight": torch.full((6,), float("nan"))},
        {"modules_to_save": ["norm"]},
        "not finite",
    ),
    "half a pair": ({f"{Q}.lora_A.weight": torch.ones(2, 4)}, {}, "lora_B"),
    "another type": (factors(), {"peft_type": "IA3"}, "IA3"),
    "bias of B": (factors(), {"lora_bias": True}, "missing .*lora_B.bias"),
    "alpha not a number": (factors(), {"lora_alpha": "much"}, "lora_alpha"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_bad_adapters(case: str, base: Path, tmp_path: Path) -> None:
    tensors, config, why = ADAPTERS[case]
    refused(CheckpointError, why, base, write_adapter(tmp_path / "adapter", tensors, **config), tmp_path / "out")


def test_a_truncated_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    refused(CheckpointError, "too short for its header", base, adapter, tmp_path / "out")


def test_two_dora_copies_and_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    dora = factors() | {f"{Q}.lora_magnitude_vector": torch.ones(6)}
    other = write_adapter(tmp_path / "dora", dora, use_dora=True)
    refused(MergeError, "weight 1 only", base, [(other, 0.5)], tmp_path / "out")
    for weight in (0, float("nan"), float("inf"), "1"):
        refused(ConfigError, "must be a finite number other than 0", base, [(adapter, weight)], tmp_path / "out")
    refused(MergeError, "given twice", base, [adapter, (adapter, 0.5)], tmp_path / "out")
    refused(ConfigError, "no adapter", base, [], tmp_path / "out")


def test_full_copies_have_no_sum(base: Path, tmp_path: Path) -> None:
    content = factors() | {"norm.weight": torch.ones(6)}
    one = write_adapter(tmp_path / "one", content, modules_to_save=["norm"])
    two = write_adapter(tmp_path / "two", content, modules_to_save=["norm"])
    refused(MergeError, "each bring a full copy of norm.weight", base, [one, two], tmp_path / "out")
    refused(MergeError, "no weighted form", base, [(one, 0.5)], tmp_path / "out")


def test_what_does_not_fit_into_float16(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES, dtype=torch.float16)
    adapter = write_adapter(tmp_path / "adapter", {k: v * 1e4 for k, v in factors().items()})
    refused(MergeError, "do not fit into F16", base, adapter, tmp_path / "out")


def test_options_that_cannot_be_meant(base: Path, adapter: Path, tmp_path: Path) -> None:
    refused(MergeError, "dtype must be one of", base, adapter, tmp_path / "out", dtype="int8")
    refused(MergeError, "verify must be", base, adapter, tmp_path / "out", verify="no")
    refused(MergeError, "untouched must be", base, adapter, tmp_path / "out", untouched="symlink")
    refused(MergeError, "threads must be", base, adapter, tmp_path / "out", threads=0)


def test_places_that_cannot_be_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    refused(OutputError, "is the base model itself", base, adapter, base)
    refused(OutputError, "lies inside the base model", base, adapter, base / "merged")
    refused(OutputError, "is the adapter .* itself", base, adapter, adapter)
    (tmp_path / "link").symlink_to(base)
    refused(OutputError, "is the base model itself", base, adapter, tmp_path / "link")
    (tmp_path / "file").write_text("x")
    refused(OutputError, "is a file", base, adapter, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    refused(OutputError, "not empty", base, adapter, tmp_path / "full")
    refused(OutputError, "cannot write to", base, adapter, tmp_path / "file" / "merged")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_disk_that_takes_no_folder(
    code: int, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, *rest: object, **options: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(OutputError, f"cannot write to .*{os.strerror(code)}", base, adapter, tmp_path / "out")


def test_an_empty_folder_is_taken(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_too_little_room(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**24)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: usage)
    refused(OutputError, r"needs 16\.8 MB, .* the disk .* has 16\.8 MB free", base, adapter, tmp_path / "out")


def test_a_disk_that_is_full_after_all(adapter: Path, tmp_path: Path) -> None:
    """The system refuses to write beyond a limit: one sentence, nothing left."""
    base = write_base(tmp_path / "base", SHAPES | {"big.weight": (600, 1000)}, {"model_type": "llama"})
    code = (
        "import resource, sys, lowrank.cli; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
        "sys.exit(lowrank.cli.main(sys.argv[1:]))"
    )
    arguments = ["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "File too large" in done.stderr and "nothing is left of it" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_hub_cache_may_link_to_its_blobs(adapter: Path, tmp_path: Path) -> None:
    """`snapshots/REV/file` → `../../blobs/HASH` is how the Hub's cache stores every model."""
    plain = write_base(tmp_path / "plain", SHAPES, {"model_type": "llama"})
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(plain.iterdir()):
        shutil.move(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    merge_checkpoint(snapshot, adapter, tmp_path / "out")
    assert "`a/b` with `adapter` merged into it" in (tmp_path / "out" / "README.md").read_text()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_sources_are_only_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    """No file of base or adapter is ever opened for writing, whatever the call that opens it."""
    code = """
import os, sys
base, adapter, out = sys.argv[1:]
wrong = []
def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if str(path).startswith((base, adapter)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            wrong.append(path)
    if event in ("os.rename", "os.remove", "os.truncate", "os.link", "os.symlink", "os.mkdir", "os.chmod"):
        wrong.extend(p for p in map(str, arguments) if p.startswith((base, adapter)))
sys.addaudithook(hook)
import lowrank
lowrank.merge_checkpoint(base, adapter, out, verify="full")
print(wrong)
"""
    arguments = [str(base), str(adapter), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_weight_file_as_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").rename(base / "other.safetensors")
    merge_checkpoint(base / "other.safetensors", adapter, tmp_path / "out")
    assert (tmp_path / "out" / "other.safetensors").is_file()
    assert struct.unpack("<Q", (tmp_path / "out" / "other.safetensors").read_bytes()[:8])
