"""The smallest file of every kind of fault that was found: each is a sentence, or a right answer, and never more."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

import lowrank
from checkpoint_models import gpt2, llama
from lowrank import LoraConfig
from lowrank.adapters.convert import convert_adapter
from lowrank.adapters.convert.gguf_file import MAGIC, read_gguf
from lowrank.adapters.differences import pair
from lowrank.analysis.inspection import inspect_adapter
from lowrank.checkpoint.config_file import USED
from lowrank.checkpoint.read import read_adapter, read_pickle
from lowrank.core.rows import RowBlock, are_disjoint
from lowrank.errors import CheckpointError, LowrankError
from lowrank.files.json_file import parse_json
from lowrank.modelfiles.base import Source, read_base
from lowrank.modelfiles.blocks import whole


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Two adapters of a small GPT-2: with parts of a fused projection, and one whose training did not start at zero."""
    folder = tmp_path_factory.mktemp("sound")
    for name, options in (("fused", {"target_modules": ["c_attn[q,v]"]}), ("plain", {"target_modules": ["c_fc"]})):
        model = gpt2()
        lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        lowrank.save_adapter(model, folder / name)
    return folder


@pytest.fixture
def fused(originals, tmp_path):
    return shutil.copytree(originals / "fused", tmp_path / "fused")


@pytest.fixture
def plain(originals, tmp_path):
    return shutil.copytree(originals / "plain", tmp_path / "plain")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def tried(adapter, tmp_path):
    """Every command that reads an adapter answers, or refuses in a sentence; the model is plain where loading does."""
    outcomes = []
    calls = [
        lambda: read_adapter(adapter),
        lambda: inspect_adapter(adapter),
        lambda: convert_adapter(adapter, tmp_path / "out", to="mlx"),
    ]
    for call in calls:
        try:
            call()
            outcomes.append(None)
        except LowrankError as error:
            outcomes.append(str(error))
    model = gpt2()
    try:
        lowrank.load_adapter(model, adapter)
        outcomes.append(None)
    except LowrankError as error:
        outcomes.append(str(error))
        assert not lowrank.adapter_configs(model)
    for said in outcomes:
        assert said is None or ("\n" not in said and len(said) < 2000)
    return outcomes


HUGE = 10**400
ODD = [
    None,
    True,
    0,
    -1,
    0.0,
    1e308,
    2**63,
    10**299,
    float("nan"),
    float("inf"),
    "",
    "x",
    "(",
    "a\nb",
    [],
    {},
    [[]],
    [None],
]
FIELDS = [*USED, "peft_type", "base_model_name_or_path", "unheard_of"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", FIELDS)
def test_any_field_with_any_value(plain, tmp_path, field):
    path = plain / "adapter_config.json"
    sound = path.read_text()
    for value in ODD:
        path.write_text(json.dumps(json.loads(sound) | {field: value}))
        tried(plain, tmp_path)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": HUGE},
        {"alpha_pattern": {"c_fc": HUGE}},
        {"r": HUGE},
        {"rank_pattern": {"(" * 5000: 2}},
        {"target_modules": "(" * 5000},
        {"rank_pattern": {r"(?=(\w))\1": 2}},
    ],
    ids=["alpha", "alpha_pattern", "r", "rank_pattern", "target_modules", "back reference"],
)
def test_numbers_and_expressions_beyond_reason(plain, tmp_path, fields):
    edit(plain / "adapter_config.json", lambda config: config.update(fields))
    assert all(said and "adapter_config.json" in said for said in tried(plain, tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_an_expression_that_never_ends_in_re(plain, tmp_path):
    edit(plain / "adapter_config.json", lambda config: config.update(rank_pattern={r"((\w|\.)+)+!": 2}))
    assert tried(plain, tmp_path) == [None] * 4


ROWS = [
    [-5, 8, 8, 1],
    [0, 0, 0, 0],
    [],
    [0, -1, 1, 1],
    [0, 2**63, 1, 1],
    [0, 10**9, 1, 1],
    [0, 1, 1, 10**9],
    [0, 1.5, 1, 1],
]
ROWS += [[True, 1, 1, 1], ["0", 1, 1, 1], None, [0, 4, 0, 2], [0, 16, 16, 1]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rows_that_are_none(fused, tmp_path, row):
    """Refused, or not believed: what is allocated for rows is never more than the matrix has."""

    def change(companion):
        for entry in companion["fused"].values():
            entry["rows"][0] = row

    edit(fused / "lowrank.json", change)
    tried(fused, tmp_path)
    for number in (float("inf"), float("nan")):
        edit(fused / "lowrank.json", lambda c, n=number: [e["rows"].append([0, n, 1, 1]) for e in c["fused"].values()])
        assert any(tried(fused, tmp_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [0.0, 1, "x", [], {}, True, {"architecture": 1}, {"shapes": []}], ids=str)
@pytest.mark.parametrize("field", ["base", "fused", "start", "format", "scales"])
def test_any_field_of_the_companion(fused, tmp_path, field, value):
    edit(fused / "lowrank.json", lambda companion: companion.update({field: value}))
    tried(fused, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_100_000_rows(fused, tmp_path):
    edit(
        fused / "lowrank.json",
        lambda c: next(iter(c["fused"].values())).update(rows=[[n, 1, 1, 1] for n in range(100_000)]),
    )
    assert all(said and "100,000 parts" in said for said in tried(fused, tmp_path))


def test_blocks_of_rows():
    for numbers in ((-1, 1), (0, 0), (0, 1, 0, 0), (0, 2, 1, 2), (0, -3)):
        with pytest.raises(ValueError, match="means no rows"):
            RowBlock(*numbers)
    assert are_disjoint((RowBlock(0, 4), RowBlock(4, 4)), 8)
    assert are_disjoint((RowBlock(0, 4, 10**30), RowBlock(4, 4, -1)), 8)  # the stride of a single run means nothing
    assert are_disjoint((RowBlock(0, 2, 4, 2), RowBlock(2, 2, 4, 2)), 8)
    assert not are_disjoint((RowBlock(0, 4), RowBlock(3, 4)), 8)
    assert not are_disjoint((RowBlock(0, 4), RowBlock(4, 5)), 8)
    assert not are_disjoint((RowBlock(0, 10**15),), 8) and not are_disjoint((), 8)


@pytest.mark.parametrize("name", ["adapter_config.json", "lowrank.json", "adapter_model.safetensors"])
def test_pipes_and_devices_are_not_waited_for(plain, tmp_path, name):
    (plain / name).unlink()
    os.mkfifo(plain / name)
    said = tried(plain, tmp_path)
    assert all(said)
    (plain / name).unlink()
    (plain / name).symlink_to("/dev/zero")
    assert all(tried(plain, tmp_path))


def test_a_base_of_pipes(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no regular file but a pipe"):
        read_base(tmp_path)


def test_names_that_command_a_terminal(plain, tmp_path):
    for name in ("a\x1b]0;pwn\x07", "a\nlowrank: error: fake", "\u202e", "." * 20_000, "a" * 1001):
        tensors = {f"base_model.model.{name}.lora_{r}.weight": torch.ones(2, 2) for r in "AB"}
        save_file(tensors, plain / "adapter_model.safetensors")
        for said in tried(plain, tmp_path):
            assert "is no name for a tensor" in said and said.isprintable()


def test_a_file_cut_short_while_it_is_read(plain):
    """Read, not mapped: another program may cut the file at any time, and no signal ends the process."""
    path = plain / "adapter_model.safetensors"
    whole = path.read_bytes()
    done = threading.Event()

    def spoil():
        while not done.is_set():
            os.truncate(path, 200)
            path.write_bytes(whole)

    thread = threading.Thread(target=spoil)
    thread.start()
    try:
        for _ in range(100):
            try:
                files = read_adapter(plain)
            except CheckpointError:
                continue
            os.truncate(path, 100)
            assert all(tensor.isfinite().all() for roles in files.low_rank.values() for tensor in roles.values())
    finally:
        done.set()
        thread.join()


def text(word):
    return struct.pack("<Q", len(word)) + word.encode()


def gguf(entries, data=b"", values=0):
    """Bytes of a GGUF file: entries of (name, dimensions, type, offset)."""
    head = MAGIC + struct.pack("<IQQ", 3, len(entries), values)
    for name, dimensions, kind, offset in entries:
        head += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    return head.ljust(-len(head) // 32 * -32, b"\0") + data


@pytest.mark.parametrize(
    "content",
    [
        gguf([("a", (), 0, 0)], bytes(64)),
        gguf([("a", (0, 4), 0, 0)], bytes(64)),
        gguf([(f"t{n}", (64,), 0, 0) for n in range(600)], bytes(256)),
        gguf([("a", (2**62, 4), 0, 0)], bytes(64)),
        gguf([("a", (4,), 0, 2**63)], bytes(64)),
        gguf([("a\x1b[2J", (4,), 0, 0)], bytes(64)),
        gguf([("a", (4,), 0, 0), ("a", (4,), 0, 32)], bytes(64)),
        gguf([("a", (4,), 7, 0)], bytes(64)),
        MAGIC + struct.pack("<IQQ", 3, 2**60, 0),
        MAGIC,
        b"",
    ],
    ids=[
        "no dimensions",
        "rank 0",
        "on each other",
        "huge",
        "far",
        "escape",
        "twice",
        "quantised",
        "many",
        "cut",
        "empty",
    ],
)
def test_gguf_files_that_are_none(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(tmp_path / "a.gguf")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("architectures", [1, True, [[]], [{}], "x" * 10_000, None, ["LlamaForCausalLM", 1]], ids=str)
def test_architectures_of_any_type(plain, tmp_path, architectures):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    with pytest.raises(LowrankError) as caught:
        convert_adapter(plain, tmp_path / "out.gguf", to="gguf", model=tmp_path)
    assert len(str(caught.value)) < 2000


def test_pickles_of_expanded_tensors(tmp_path):
    """A few bytes that would become terabytes where they are copied."""
    torch.save({"a.lora_A": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="no name with a plain tensor"):
        read_pickle(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 80 + "]" * 80, "1" * 400, '{"a": ' * 70 + "1" + "}" * 70, "\ud800"]
)
def test_json_out_of_bounds(text):
    with pytest.raises(ValueError):
        parse_json(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError):
        parse_json(text.encode("utf-16", errors="surrogatepass"))
    assert parse_json('{"a": [1, 2.5, "x", 1e999]}') == {"a": [1, 2.5, "x", float("inf")]}


def test_a_hostile_adapter_on_the_command_line(plain):
    """The last word: a program of its own, one line, status 2."""
    edit(
        plain / "adapter_config.json",
        lambda config: config.update(lora_alpha=HUGE, base_model_name_or_path="a\x1b[2J\nb"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "lowrank", "inspect", plain], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a number of 401 digits" in done.stderr


def test_loading_leaves_a_llama_plain(plain):
    """An adapter of another model names what does not fit in a few lines."""
    with pytest.raises(CheckpointError) as caught:
        lowrank.load_adapter(llama(), plain)
    assert len(str(caught.value)) < 2000


def test_a_base_cut_short_while_it_is_read(tmp_path):
    """What `inspect --model`, `extract` and a DoRA merge hold of a base is theirs: cutting the file changes nothing."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder, value in ((base, 1.0), (tuned, 2.0)):
        folder.mkdir()
        save_file({"a.weight": torch.full((3000, 100), value)}, folder / "model.safetensors")
    files = read_base(base)
    held = whole(Source(*files.tensors["a.weight"]))
    difference = pair(files, read_base(tuned)).shared[0]
    os.truncate(base / "model.safetensors", 5000)
    assert (held == 1).all()
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        list(difference.blocks())
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        _ = difference.identical


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, 1, 16), (64, 1, 4)),
        ((4, 3, 5), (8, 2, 1)),
        ((4, 4, 5), (8, 4, 2)),
        ((4, 4, 5), (8, 8, 1)),
        ((4, 4), (8, 2)),
    ],
    ids=["no channel for a group", "channels left over", "a kernel in B", "more than the rank", "groups of a Linear"],
)
def test_factors_that_are_of_no_layer(plain, tmp_path, a, b):
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(a), "base_model.model.x.lora_B.weight": torch.ones(b)},
        plain / "adapter_model.safetensors",
    )
    edit(plain / "adapter_config.json", lambda config: config.update(r=4, target_modules=["x"]))
    (plain / "lowrank.json").unlink()
    *of_files, of_model = tried(plain, tmp_path)
    assert all(said and "has A" in said for said in of_files) and of_model
