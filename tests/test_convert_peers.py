"""The other programs themselves: llama.cpp and mlx-lm load what `convert` writes, and answer as our model does.

Skipped where they are not installed: `pip install gguf xllamacpp` (llama.cpp in a wheel) `mlx[cpu] mlx-lm`.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from checkpoint_models import disturb
from lowrank import LoraConfig
from lowrank.adapters.convert import convert_adapter
from merge_disk_models import write_adapter

IDS = [1, 5, 17, 33, 40, 9]
CONFIG = {
    "r": 3,
    "lora_alpha": 7,
    "rank_pattern": {"layers.1.*v_proj": 5},
    "alpha_pattern": {"o_proj": -1.5},
    "target_modules": [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "lm_head",
        "embed_tokens",
    ],
}
WIDTH, HEADS, KV_HEADS, INNER, WORDS, LENGTH = 64, 4, 2, 96, 64, 128


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=WORDS,
        max_position_embeddings=LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def log_probabilities(model):
    """Of the word after IDS, (WORDS,)."""
    return model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


@pytest.fixture
def adapted(tmp_path):
    """The base and an adapter in files, and what both say: (folder, base's answer, adapted answer)."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    plain = log_probabilities(model)
    lowrank.inject(model, LoraConfig(**CONFIG))
    disturb(model)
    lowrank.save_adapter(model, tmp_path / "adapter")
    changed = log_probabilities(model)
    assert float((changed - plain).abs().max()) > 5
    return tmp_path, plain, changed


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_base(model, path):
    """The base in GGUF, by the gguf package; rows of query and key reordered as llama.cpp's own converter does."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"▁t{i}" for i in range(WORDS - 3))])
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types([2, 3, 3, *[1] * (WORDS - 3)])
    for key, tensor in model.state_dict().items():
        place = key.removesuffix(".weight")
        layer = place.removeprefix("model.layers.").partition(".")
        name = ENDS.get(place) or f"blk.{layer[0]}.{NAMES[layer[2]]}"
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.rpartition(".")[2])
        if heads:
            tensor = tensor.view(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{name}.weight", tensor.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask_llama_cpp(base, adapter=None):
    """The log-probabilities of the word after IDS, (WORDS,)."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(base)
    parameters.n_ctx = LENGTH
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cpuparams.n_threads = 1
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        parameters.lora_adapters = [lora]
    answer = xllamacpp.Server(parameters).handle_completions(
        {"prompt": IDS, "n_predict": 1, "n_probs": WORDS, "logprobs": WORDS, "temperature": 0.0}
    )
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    first = (answer.get("completion_probabilities") or answer["choices"][0]["logprobs"]["content"])[0]
    found = {word["id"]: word["logprob"] for word in first["top_logprobs"]}
    return torch.tensor([found[word] for word in range(WORDS)])


def test_llama_cpp_answers_alike(adapted):
    """Its key-value cache is float16, hence the bound."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    folder, plain, changed = adapted
    write_base(llama(), folder / "base.gguf")
    convert_adapter(folder / "adapter", folder / "adapter.gguf", to="gguf", model=folder / "base")
    assert torch.allclose(ask_llama_cpp(folder / "base.gguf"), plain, atol=0.03)
    assert torch.allclose(ask_llama_cpp(folder / "base.gguf", folder / "adapter.gguf"), changed, atol=0.03)


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_lm_answers_alike(adapted, dora):
    mx = pytest.importorskip("mlx.core")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    from mlx_lm.models.llama import Model, ModelArgs

    folder, _, changed = adapted
    if dora:
        model = llama()
        lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], use_dora=True))
        disturb(model)
        lowrank.save_adapter(model, folder / "adapter")
        changed = log_probabilities(model)
    convert_adapter(folder / "adapter", folder / "mlx", to="mlx")
    theirs = Model(ModelArgs.from_dict(json.loads((folder / "base" / "config.json").read_text())))
    theirs.load_weights(str(folder / "base" / "model.safetensors"))
    theirs = tuner.load_adapters(theirs, str(folder / "mlx"))
    theirs.eval()
    logits = torch.tensor(theirs(mx.array([IDS]))[0, -1].tolist())
    assert torch.allclose(logits.log_softmax(-1), changed, atol=2e-3)


SMALL = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
SMALL_GPT = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": LENGTH}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "dense", "query_key_value"]
LAYERS = [*ATTENTION, "c_attn", "c_proj", "c_fc", "fc1", "fc2", "fc_in", "fc_out", "dense_h_to_4h", "dense_4h_to_h"]
OTHERS = {  # what mlx-lm calls other names than transformers, or may be thought to
    "gpt2": ("GPT2", SMALL_GPT),
    "gptj": ("GPTJ", SMALL_GPT | {"rotary_dim": 8, "tie_word_embeddings": False}),
    "gpt_bigcode": ("GPTBigCode", SMALL_GPT | {"n_inner": INNER}),
    "gpt_neox": ("GPTNeoX", SMALL | {"intermediate_size": 4 * WIDTH, "max_position_embeddings": LENGTH}),
    "phi": ("Phi", SMALL | {"intermediate_size": INNER, "num_key_value_heads": KV_HEADS}),
    "starcoder2": ("Starcoder2", SMALL | {"intermediate_size": INNER, "num_key_value_heads": KV_HEADS}),
    "mixtral": ("Mixtral", SMALL | {"intermediate_size": INNER, "num_local_experts": 3, "num_key_value_heads": 2}),
    "olmoe": ("Olmoe", SMALL | {"intermediate_size": INNER, "num_experts": 3, "num_experts_per_tok": 2}),
}


def mlx_answer(folder, adapter=None):
    """mlx-lm's log-probabilities of the word after IDS, (WORDS,), for a checkpoint in transformers' files."""
    import importlib

    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters

    older = {"n_ctx": LENGTH, "rotary_emb_base": 10_000, "rotary_pct": 0.25}  # fields that transformers 5 dropped
    config = older | json.loads((folder / "config.json").read_text())
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    theirs = module.Model(module.ModelArgs.from_dict(config))
    weights = mx.load(str(folder / "model.safetensors"))
    if config["model_type"] == "gpt2":  # mlx-lm reads the Hub's files, which have no such prefix
        weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    theirs.load_weights(list((theirs.sanitize(weights) if hasattr(theirs, "sanitize") else weights).items()))
    theirs = theirs if adapter is None else load_adapters(theirs, str(adapter))
    theirs.eval()
    return torch.tensor(theirs(mx.array([IDS]))[0, -1].tolist()).log_softmax(-1)


@pytest.mark.parametrize("family", OTHERS)
def test_mlx_lm_finds_every_module_by_its_own_name(tmp_path, family):
    """Its model with our adapter answers as its model of the merged files, whose names it translates itself."""
    pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    import transformers

    name, fields = OTHERS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    head = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    getattr(transformers, f"{name}{head}")(config).save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    factors = {}
    for key, tensor in stored.items():
        path = key.removesuffix(".weight")
        if path.rpartition(".")[2] in LAYERS or ".experts." in path:
            d, k = tensor.shape[::-1] if family == "gpt2" else tensor.shape
            factors |= {f"{path}.lora_A.weight": torch.randn(3, k), f"{path}.lora_B.weight": torch.randn(d, 3) / 8}
    assert len(factors) >= 16
    write_adapter(tmp_path / "adapter", factors, r=3, lora_alpha=2)
    lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    convert_adapter(tmp_path / "adapter", tmp_path / "mlx", to="mlx", model=tmp_path / "base")
    wanted = mlx_answer(tmp_path / "merged")
    assert float((wanted - mlx_answer(tmp_path / "base")).abs().max()) > 0.5
    assert torch.allclose(mlx_answer(tmp_path / "base", tmp_path / "mlx"), wanted, atol=5e-3)
    if ".experts." not in str(list(factors)):
        convert_adapter(tmp_path / "mlx", tmp_path / "back", model=tmp_path / "base")
        lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "back", tmp_path / "again")
        assert torch.allclose(mlx_answer(tmp_path / "again"), wanted, atol=1e-3)
