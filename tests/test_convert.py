"""Adapters in other programs' formats: ΔW is the same on both sides, by those programs' own definitions."""

import contextlib
import json
import math
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from checkpoint_models import answer, bert, convolutions, disturb, gpt2, llama
from lowrank import LoraConfig
from lowrank.adapters.convert import convert_adapter
from lowrank.adapters.convert.gguf_file import gguf_bytes, read_gguf
from lowrank.checkpoint.adapter_folder import target_of
from lowrank.checkpoint.read import read_adapter
from lowrank.errors import CheckpointError, ConfigError, LowrankError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
MIXED = {
    "r": 3,
    "lora_alpha": 7,
    "rank_pattern": {"layers.1.*v_proj": 5, "down_proj": 2},
    "alpha_pattern": {"o_proj": -1.5},
    "target_modules": ALL,
}


def make(build, folder, **config):
    model = build()
    lowrank.inject(model, LoraConfig(**config))
    disturb(model)
    lowrank.save_adapter(model, folder)
    return folder


def deltas(folder):
    """{path: (kind, ΔW in float64)}"""
    files = read_adapter(folder)
    found = {path: target_of(files, path) for path in files.low_rank}
    return {path: (t.kind, t.scale * t.b.double() @ t.a.double()) for path, t in found.items()}


def assert_same(one, other, bound=1e-6):
    assert one.keys() == other.keys()
    for path, (kind, delta) in one.items():
        assert other[path][0] == kind
        assert delta.norm() > 0.01
        assert float((delta - other[path][1]).norm()) < bound * float(delta.norm())


def by_peft(model, folder):
    from peft import PeftModel

    return answer(PeftModel.from_pretrained(model, folder).eval())


def by_us(model, folder):
    lowrank.load_adapter(model, folder)
    return answer(model)


@pytest.fixture
def base(tmp_path):
    """The folder of the tiny Llama, of which GGUF needs the config."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("to", "name"), [("loralib", "x.bin"), ("loralib", "x.safetensors"), ("mlx", "x"), ("gguf", "x.gguf")]
)
def test_there_and_back_is_the_same_change(tmp_path, base, to, name, rslora):
    make(llama, tmp_path / "in", **MIXED, use_rslora=rslora)
    middle = tmp_path / name
    first = convert_adapter(tmp_path / "in", middle, to=to, model=base)
    assert first.modules == 2 * 7 + 2
    alpha = float(str(first).split("lora_alpha=")[1].split(":")[0]) if to == "loralib" else None
    convert_adapter(middle, tmp_path / "out", to="peft", model=base, alpha=alpha, allow_pickle=name.endswith(".bin"))
    assert_same(deltas(tmp_path / "in"), deltas(tmp_path / "out"))
    wanted = by_us(llama(), tmp_path / "in")
    assert torch.allclose(by_us(llama(), tmp_path / "out"), wanted, atol=1e-4)
    assert torch.allclose(by_peft(llama(), tmp_path / "out"), wanted, atol=1e-4)


def test_mlx_files_mean_what_mlx_computes(tmp_path):
    """h = W0·x + scale·((x·lora_a)·lora_b), one rank and one scale for all, keys that name every module."""
    make(llama, tmp_path / "in", **MIXED)
    convert_adapter(tmp_path / "in", tmp_path / "out", to="mlx")
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    parameters = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == -1
    wanted = deltas(tmp_path / "in")
    assert set(parameters["keys"]) == wanted.keys() == {name.rpartition(".")[0] for name in tensors}
    for path, (_, delta) in wanted.items():
        a, b = tensors[f"{path}.lora_a"].double(), tensors[f"{path}.lora_b"].double()
        assert a.shape[1] == b.shape[0] == parameters["rank"] == 5
        assert torch.allclose(parameters["scale"] * (a @ b).t(), delta, atol=1e-6)


def test_dora_goes_to_mlx_with_its_magnitudes(tmp_path):
    make(llama, tmp_path / "in", r=3, lora_alpha=7, target_modules=["q_proj"], use_dora=True)
    convert_adapter(tmp_path / "in", tmp_path / "mlx", to="mlx")
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    convert_adapter(tmp_path / "mlx", tmp_path / "out")
    assert torch.allclose(by_peft(llama(), tmp_path / "out"), by_us(llama(), tmp_path / "in"), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gguf_is_read_by_the_gguf_package_and_has_llama_cpps_rows(tmp_path, base, dtype):
    gguf = pytest.importorskip("gguf")
    make(llama, tmp_path / "in", **MIXED)
    convert_adapter(tmp_path / "in", tmp_path / "x.gguf", to="gguf", model=base, dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    text = {key: bytes(field.parts[-1]).decode() for key, field in reader.fields.items() if field.types[-1:] == [8]}
    assert text["general.architecture"] == "llama"
    assert (text["general.type"], text["adapter.type"]) == ("adapter", "lora")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type)).double() for t in reader.tensors}
    wanted = deltas(tmp_path / "in")
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    checked = 0
    for path, name in [
        ("model.layers.1.self_attn.q_proj", "blk.1.attn_q"),
        ("model.layers.0.self_attn.k_proj", "blk.0.attn_k"),
        ("model.layers.1.self_attn.v_proj", "blk.1.attn_v"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
        ("lm_head", "output"),
        ("model.embed_tokens", "token_embd"),
    ]:
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        a = a.t() if name == "token_embd" else a
        delta = alpha / b.shape[1] * b @ a
        heads = {"blk.1.attn_q": 4, "blk.0.attn_k": 2}.get(name)
        reference = wanted[path][1]
        if heads:
            reference = torch.stack([reference[row] for row in pair_by_pair(len(reference), heads)])
        assert float((delta - reference).norm()) < bound * float(reference.norm())
        checked += 1
    assert checked == 6
    assert len(tensors) == 2 * len(wanted)


def pair_by_pair(rows, heads):
    """For llama.cpp's rows in order, the row of transformers' weight: 0, h/2, 1, h/2 + 1, ... within each head."""
    size = rows // heads
    return [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in range(2)]


def test_gguf_of_conv1d_layers_is_not_flipped(tmp_path):
    make(gpt2, tmp_path / "in", r=3, lora_alpha=7, target_modules=["c_attn", "c_fc"])
    gpt2().save_pretrained(tmp_path / "base")
    convert_adapter(tmp_path / "in", tmp_path / "x.gguf", to="gguf", model=tmp_path / "base")
    convert_adapter(tmp_path / "x.gguf", tmp_path / "out", model=tmp_path / "base")
    assert_same(deltas(tmp_path / "in"), deltas(tmp_path / "out"))
    assert torch.allclose(by_us(gpt2(), tmp_path / "out"), by_us(gpt2(), tmp_path / "in"), atol=1e-5)


def test_loralibs_own_layers_answer_alike(tmp_path):
    loralib = pytest.importorskip("loralib")

    class Net(nn.Module):
        def __init__(self, lin, qkv, emb):
            super().__init__()
            self.embed, self.lin, self.qkv = emb, lin, qkv

        def forward(self, ids):
            return self.qkv(self.lin(self.embed(ids)).tanh())

    theirs = Net(
        loralib.Linear(6, 8, r=2, lora_alpha=5, merge_weights=False),
        loralib.MergedLinear(8, 12, r=3, lora_alpha=5, enable_lora=[True, False, True], merge_weights=False),
        loralib.Embedding(9, 6, r=4, lora_alpha=5, merge_weights=False),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
    torch.save(loralib.lora_state_dict(theirs, bias="lora_only"), tmp_path / "x.pt")
    ids = torch.arange(9)
    wanted = theirs.eval()(ids)
    report = convert_adapter(
        tmp_path / "x.pt", tmp_path / "out", alpha=5, enable_lora=[True, False, True], allow_pickle=True
    )
    assert "embed" in str(report)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if "lora_" not in name}

    def plain():
        net = Net(nn.Linear(6, 8), nn.Linear(8, 12), nn.Embedding(9, 6))
        net.load_state_dict(state)
        return net

    from peft import PeftModel

    ours = plain()
    lowrank.load_adapter(ours, tmp_path / "out")
    assert torch.allclose(ours(ids), wanted, atol=1e-5)
    assert torch.allclose(PeftModel.from_pretrained(plain(), tmp_path / "out").eval()(ids), wanted, atol=1e-5)
    convert_adapter(tmp_path / "out", tmp_path / "back.bin", to="loralib")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert torch.equal(back["lin.bias"], theirs.lin.bias)
    assert torch.equal(back["lin.lora_A"], theirs.lin.lora_A)


def test_the_authors_own_checkpoint_becomes_an_adapter(tmp_path, shared):
    source = shared / "adapters" / "loralib_roberta_base_mnli" / "roberta_base_lora_mnli.bin"
    report = convert_adapter(source, tmp_path / "out", alpha=16, allow_pickle=True)
    assert report.modules == 24
    raw = torch.load(source, map_location="cpu", weights_only=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["modules_to_save"] == ["classifier.dense", "classifier.out_proj"]
    found = deltas(tmp_path / "out")
    path = "roberta.encoder.layer.7.attention.self.query"
    expected = 2.0 * raw[f"{path}.lora_B"].double() @ raw[f"{path}.lora_A"].double()
    assert torch.allclose(found[path][1], expected)


@pytest.mark.parametrize("name", ["lora_mlp-0.6.1", "lora_emb_conv1d-0.6.1"])
def test_old_pickles_become_safetensors_and_back_bit_for_bit(tmp_path, shared, name):
    source = shared / "adapters" / name
    convert_adapter(source, tmp_path / "new", allow_pickle=True)
    old = torch.load(source / "adapter_model.bin", map_location="cpu", weights_only=True)
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert new.keys() == old.keys()
    assert all(torch.equal(new[key], old[key]) for key in old)
    assert (tmp_path / "new" / "adapter_config.json").read_bytes() == (source / "adapter_config.json").read_bytes()
    convert_adapter(tmp_path / "new", tmp_path / "back", to="peft-bin")
    back = torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True)
    assert all(torch.equal(back[key], old[key]) for key in old)
    with pytest.raises(CheckpointError, match="allow_pickle"):
        convert_adapter(source, tmp_path / "other")


@pytest.mark.parametrize("size", ["10GB", "4KB"])
def test_a_pickled_model_becomes_safetensors(tmp_path, size):
    source = tmp_path / "old"
    model = gpt2()
    model.save_pretrained(tmp_path / "whole", max_shard_size=size)
    source.mkdir()
    (source / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    state = model.state_dict()  # holds the tied head a second time, as such files do
    if size == "10GB":
        torch.save(state, source / "pytorch_model.bin")
    else:
        names = sorted(state)
        table = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(names)}
        table["lm_head.weight"] = table["transformer.wte.weight"]
        for file in set(table.values()):
            torch.save({name: state[name] for name in names if table[name] == file}, source / file)
        index = {"metadata": {"total_size": 1}, "weight_map": table}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        convert_adapter(source, tmp_path / "new", to="safetensors")
    assert not (tmp_path / "new").exists()
    convert_adapter(source, tmp_path / "new", to="safetensors", allow_pickle=True)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert torch.equal(answer(again), answer(model))
    assert not list(tmp_path.glob(".*.tmp"))


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_pickles_that_are_more_than_tensors_are_refused(tmp_path):
    source = tmp_path / "evil"
    source.mkdir()
    (source / "config.json").write_text("{}")
    with open(source / "pytorch_model.bin", "wb") as file:
        pickle.dump({"weight": Evil()}, file)
    with pytest.raises(CheckpointError, match="cannot be converted") as caught:
        convert_adapter(source, tmp_path / "out", to="safetensors", allow_pickle=True)
    assert "Traceback" not in str(caught.value)
    (tmp_path / "evil.bin").write_bytes((source / "pytorch_model.bin").read_bytes())
    with pytest.raises(CheckpointError, match="more than a table of tensors"):
        convert_adapter(tmp_path / "evil.bin", tmp_path / "out", alpha=1, allow_pickle=True)
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_hold_is_refused(tmp_path, base):
    make(llama, tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    make(convolutions, tmp_path / "conv", r=2, target_modules=["one"])
    make(bert, tmp_path / "full", r=2, target_modules=["query"], modules_to_save=["classifier"])
    make(gpt2, tmp_path / "other", r=2, target_modules=["c_attn"])
    cases = [
        ("dora", "loralib", "magnitudes"),
        ("dora", "gguf", "magnitudes"),
        ("conv", "loralib", "convolutions"),
        ("conv", "mlx", "convolutions"),
        ("full", "mlx", "tensors in full"),
        ("full", "gguf", "tensors in full"),
        ("other", "gguf", "has no name for"),
    ]
    for source, to, message in cases:
        out = tmp_path / {"loralib": "out.bin", "gguf": "out.gguf", "mlx": "out"}[to]
        with pytest.raises(CheckpointError, match=message):
            convert_adapter(tmp_path / source, out, to=to, model=base)
        assert not out.exists()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_head_or_table_that_llama_cpp_cannot_take_is_refused(tmp_path, base, target):
    make(llama, tmp_path / "in", r=2, target_modules=["q_proj", target])
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{target} is adapted"):
        convert_adapter(tmp_path / "in", tmp_path / "x.gguf", to="gguf", model=base)


def test_wrong_calls_are_one_sentence_and_leave_nothing(tmp_path, base):
    adapter = make(llama, tmp_path / "in", r=2, target_modules=["q_proj"])
    convert_adapter(adapter, tmp_path / "x.gguf", to="gguf", model=base)
    convert_adapter(adapter, tmp_path / "x.bin", to="loralib")
    convert_adapter(adapter, tmp_path / "mlx", to="mlx")
    (tmp_path / "short.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:-40])
    (tmp_path / "no.gguf").write_bytes(b"GGML" + bytes(100))
    (tmp_path / "huge.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    (tmp_path / "empty").mkdir()
    calls = {
        "format 'onnx' is not known": {"to": "onnx"},
        "there is no ": {"source": tmp_path / "nowhere"},
        "holds no adapter": {"source": tmp_path / "empty"},
        "is the source itself": {"out": adapter},
        "give the model's folder": {"to": "gguf", "out": tmp_path / "y.gguf"},
        "has no config.json": {"to": "gguf", "out": tmp_path / "y.gguf", "model": tmp_path / "empty"},
        "choose float32, float16 or bfloat16": {
            "to": "gguf", "out": tmp_path / "y.gguf", "model": base, "dtype": torch.float64,
        },
        "in the middle of something": {"source": tmp_path / "short.gguf", "model": base},
        "is no GGUF file": {"source": tmp_path / "no.gguf", "model": base},
        "claims to hold": {"source": tmp_path / "huge.gguf", "model": base},
        "give the alpha": {"source": tmp_path / "x.bin", "allow_pickle": True},
        "is a pickle": {"source": tmp_path / "x.bin", "alpha": 1},
        "cannot become safetensors": {"to": "safetensors"},
        "is a folder: give the name of a file": {"to": "gguf", "out": tmp_path / "empty", "model": base},
    }  # fmt: skip
    for message, call in calls.items():
        arguments = {"source": adapter, "out": tmp_path / "out"} | call
        with pytest.raises(LowrankError, match=message) as caught:
            convert_adapter(**arguments)
        assert isinstance(caught.value, ConfigError | CheckpointError)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "y.gguf").exists()


def test_a_gguf_file_cut_anywhere_is_refused(tmp_path, base):
    make(llama, tmp_path / "in", r=2, target_modules=["q_proj"])
    convert_adapter(tmp_path / "in", tmp_path / "x.gguf", to="gguf", model=base)
    whole = (tmp_path / "x.gguf").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            convert_adapter(tmp_path / "cut.gguf", tmp_path / "out", model=base)


@settings(max_examples=300)
@given(place=st.integers(0, 600), byte=st.integers(0, 255))
def test_a_gguf_file_with_a_wrong_byte_is_read_or_refused(tmp_path_factory, place, byte):
    folder = tmp_path_factory.mktemp("gguf")
    values = {"general.type": "adapter", "general.architecture": "llama", "adapter.lora.alpha": 3.0}
    tensors = {"blk.0.attn_v.weight.lora_a": torch.ones(2, 5), "blk.0.attn_v.weight.lora_b": torch.ones(3, 2)}
    damaged = bytearray(gguf_bytes(values, tensors))
    damaged[place % len(damaged)] = byte
    (folder / "x.gguf").write_bytes(damaged)
    with contextlib.suppress(CheckpointError):
        read_gguf(folder / "x.gguf")


def test_damaged_mlx_folders_are_refused(tmp_path):
    make(llama, tmp_path / "in", r=2, target_modules=["q_proj"])
    convert_adapter(tmp_path / "in", tmp_path / "mlx", to="mlx")
    weights, config = tmp_path / "mlx" / "adapters.safetensors", tmp_path / "mlx" / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    name = next(name for name in tensors if name.endswith("lora_a"))
    for damaged, message in [
        ({name: tensors[name]}, "wanted lora_a"),
        (tensors | {"model.norm.weight": torch.ones(3)}, "is no lora_a, lora_b or m"),
        ({name: torch.ones(2, 3, 4)}, "experts"),
    ]:
        save_file(damaged, weights)
        with pytest.raises(CheckpointError, match=message):
            convert_adapter(tmp_path / "mlx", tmp_path / "out")
    save_file(tensors, weights)
    for change, message in [
        ({"fine_tune_type": "full"}, "only lora and dora"),
        ({"lora_parameters": {"rank": 2}}, "no number as lora_parameters.scale"),
    ]:
        config.write_text(json.dumps(fields | change))
        with pytest.raises(CheckpointError, match=message):
            convert_adapter(tmp_path / "mlx", tmp_path / "out")


def test_a_scale_of_zero_stays_one(tmp_path):
    make(llama, tmp_path / "in", r=2, lora_alpha=4, alpha_pattern={"layers.0.*q_proj": 0}, target_modules=["q_proj"])
    convert_adapter(tmp_path / "in", tmp_path / "mlx", to="mlx")
    convert_adapter(tmp_path / "mlx", tmp_path / "out")
    found = deltas(tmp_path / "out")
    assert not found["model.layers.0.self_attn.q_proj"][1].any()
    assert math.isclose(
        float(found["model.layers.1.self_attn.q_proj"][1].norm()),
        float(deltas(tmp_path / "in")["model.layers.1.self_attn.q_proj"][1].norm()),
        rel_tol=1e-6,
    )
