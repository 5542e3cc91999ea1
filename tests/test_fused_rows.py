"""The rows that "[q,v]" names are the query and value rows, shown by what the model's own attention does with them.

No layout is written down here. A disturbance of the projection's output at one position is watched in the attention
probabilities: rows of q move one position's probabilities, rows of k move those of every position that looks there,
rows of v move none, and only the three together are all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
import reference
from lowrank import LoraConfig
from lowrank.errors import TargetError
from lowrank.injection.fused import LAYOUTS, part_rows
from models import IDS, SMALL, build, causal

AT = 2  # the disturbed position, with positions before and after it
DEEPSEEK = {
    "q_lora_rank": 6,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
DBRX = {
    "d_model": 16,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 32,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 100.0},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1},
}


@dataclass(frozen=True)
class FusedCase:
    """An architecture, its fused projection, and what is special about building and calling it."""

    model_type: str
    leaf: str
    options: dict[str, Any] = field(default_factory=dict)
    inner: Callable[[nn.Module], nn.Module] = lambda model: model
    embeds: bool = False

    def model(self) -> nn.Module:
        """The small model."""
        return build("AutoModel", self.model_type, **self.options)

    def run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """(the first layer's attention probabilities, the last hidden state)."""
        given = {"input_ids": IDS}
        if self.embeds:
            given = {"inputs_embeds": torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))}
        with torch.no_grad():
            output = self.inner(model)(**given, output_attentions=True)
        return output.attentions[0], output.last_hidden_state


CASES = {
    "gpt2": FusedCase("gpt2", "c_attn"),
    "openai-gpt": FusedCase("openai-gpt", "c_attn"),
    "imagegpt": FusedCase("imagegpt", "c_attn"),
    "decision_transformer": FusedCase(
        "decision_transformer", "c_attn", {"n_layer": 2, "n_head": 4}, lambda model: model.encoder, embeds=True
    ),
    "gpt_bigcode, one kv head": FusedCase("gpt_bigcode", "c_attn", {"multi_query": True}),
    "gpt_bigcode, all heads": FusedCase("gpt_bigcode", "c_attn", {"multi_query": False}),
    "bloom": FusedCase("bloom", "query_key_value"),
    "gpt_neox": FusedCase("gpt_neox", "query_key_value"),
    "gpt_neox_japanese": FusedCase("gpt_neox_japanese", "query_key_value"),
    "persimmon": FusedCase("persimmon", "query_key_value"),
    "falcon, one kv head": FusedCase("falcon", "query_key_value", {"multi_query": True}),
    "falcon, all heads": FusedCase("falcon", "query_key_value", {"multi_query": False}),
    "falcon, groups": FusedCase("falcon", "query_key_value", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, alibi": FusedCase("falcon", "query_key_value", {"multi_query": False, "alibi": True}),
    "phi3": FusedCase("phi3", "qkv_proj", {"num_key_value_heads": 4}),
    "phi3, groups": FusedCase("phi3", "qkv_proj", {"num_key_value_heads": 2}),
    "codegen": FusedCase("codegen", "qkv_proj", {"n_embd": 32, "n_head": 8, "rotary_dim": 2}),
    "mpt": FusedCase("mpt", "Wqkv"),
    "dbrx": FusedCase("dbrx", "Wqkv", DBRX),
    "modernbert": FusedCase("modernbert", "Wqkv"),
    "deberta": FusedCase("deberta", "in_proj"),
    "deepseek_v2": FusedCase("deepseek_v2", "kv_b_proj", DEEPSEEK),
    "deepseek_v3": FusedCase("deepseek_v3", "kv_b_proj", DEEPSEEK),
}


def first_fused(case: FusedCase, model: nn.Module) -> tuple[str, nn.Module]:
    return next((path, module) for path, module in model.named_modules() if path.endswith("." + case.leaf))


def rows_named(case: FusedCase, model: nn.Module, part: str) -> list[int]:
    path, module = first_fused(case, model)
    d = module.weight.shape[1] if reference.is_conv1d(module) else module.weight.shape[0]
    (block,) = part_rows(path, d, (part,), model.config)
    return reference.rows_of(block)


def test_every_attention_layout_is_proved_here() -> None:
    """The one other layout, Phi-3's gate and up, has a test of its own."""
    assert {(case.model_type, case.leaf) for case in CASES.values()} == set(LAYOUTS) - {("phi3", "gate_up_proj")}


@pytest.mark.parametrize("name", CASES)
def test_each_part_is_what_it_is_called(name: str) -> None:
    case = CASES[name]
    model = case.model()
    probabilities, state = case.run(model)
    positions = range(probabilities.shape[-2])
    seen, rows = [], {}
    for part in ("v", "k") if case.leaf == "kv_b_proj" else ("q", "k", "v"):
        rows[part] = rows_named(case, model, part)
        for row in rows[part]:
            moved, moved_state = disturbed(case, model, [row])
            changed = [i for i in positions if not torch.equal(moved[..., i, :], probabilities[..., i, :])]
            watched = {"q": changed == [AT], "k": {AT, AT + 1} <= set(changed), "v": changed == []}
            assert watched[part], f"row {row}, said to be of {part}, moves the probabilities of {changed}"
            assert not torch.equal(moved_state, state)
            seen.append(row)
    _, module = first_fused(case, model)
    assert sorted(seen) == list(range(module.weight.shape[1 if reference.is_conv1d(module) else 0]))


def disturbed(case: FusedCase, model: nn.Module, rows: list[int]) -> tuple[Tensor, Tensor]:
    """The run with noise added to the projection's output, in these rows at one position."""

    def disturb(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., AT, rows] += 3.0
        return output

    handle = first_fused(case, model)[1].register_forward_hook(disturb)
    try:
        return case.run(model)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", CASES)
def test_adapting_the_values_alone_leaves_the_first_attention_alone(name: str) -> None:
    case = CASES[name]
    model = case.model()
    probabilities, state = case.run(model)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=[f"{case.leaf}[v]"], init_lora_weights="random")
    lowrank.inject(model, config)
    moved, moved_state = case.run(model)
    assert torch.equal(moved, probabilities)
    assert not torch.equal(moved_state, state)
    lowrank.merge_and_unload(model)
    assert torch.equal(case.run(model)[0], probabilities)
    assert torch.allclose(case.run(model)[1], moved_state, atol=1e-5)


def test_gate_and_up_of_phi3() -> None:
    """down(act(gate)·up): doubling the up rows doubles the answer, doubling the gate rows does not; zero gates it."""
    model = causal("phi3")
    mlp = model.model.layers[0].mlp
    path, d = "model.layers.0.mlp.gate_up_proj", mlp.gate_up_proj.weight.shape[0]
    x = torch.randn(3, SMALL["hidden_size"])
    answer = mlp(x)

    def with_rows(part: str, factor: float) -> Tensor:
        (block,) = part_rows(path, d, (part,), model.config)
        weight = mlp.gate_up_proj.weight.detach().clone()
        weight[reference.rows_of(block)] *= factor
        return torch.func.functional_call(mlp, {"gate_up_proj.weight": weight}, (x,))

    assert torch.allclose(with_rows("up", 2.0), 2 * answer)
    assert not torch.allclose(with_rows("gate", 2.0), 2 * answer, rtol=1e-2)
    assert not with_rows("gate", 0.0).any()


WRONG = {
    "no such part": (["c_attn[q,w]"], r"c_attn\[q,w\].*no part w; its parts are q, k, v"),
    "named twice": (["c_attn[q,q]"], "named twice"),
    "not fused": (["c_fc[q]"], r"c_fc\[q\]: which rows of transformer\.h\.0\.mlp\.c_fc .* cannot be known.*gpt2"),
    "whole and part": (["c_attn", "c_attn[q]"], "meant twice"),
    "typo": (["c_atn[q]"], r"'c_atn' matches no module \(nearest: .*c_attn"),
}


@pytest.mark.parametrize("what", WRONG)
def test_selectors_that_cannot_be_meant(what: str) -> None:
    targets, message = WRONG[what]
    model = causal("gpt2")
    with pytest.raises(TargetError, match=message):
        lowrank.inject(model, LoraConfig(r=2, target_modules=targets))
    assert lowrank.adapter_configs(model) == {}


def test_widths_that_do_not_add_up_are_refused() -> None:
    model = causal("gpt2")
    model.config.n_embd = 20
    with pytest.raises(TargetError, match=r"add up to 60 rows but .* has 48"):
        lowrank.plan(model, LoraConfig(r=2, target_modules=["c_attn[q]"]))


def test_a_model_without_a_config_has_no_known_parts() -> None:
    holder = nn.ModuleDict({"c_attn": nn.Linear(4, 12)})
    with pytest.raises(TargetError, match="cannot be known for a model of type None"):
        lowrank.plan(holder, LoraConfig(r=2, target_modules="c_attn[q]"))
