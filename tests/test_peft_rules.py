"""Where PEFT's own rules refuse or turn what is saved in its format, saving says so: held against real PEFT."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowrank
from checkpoint_models import IDS, WIDE, disturb, llama
from lowrank import LoraConfig
from lowrank.checkpoint.peft_rules import EXPERTS, MAMBA, REFUSED, peft_faults
from lowrank.errors import LowrankWarning

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=4,
        q_lora_rank=4,
        qk_rope_head_dim=4,
        v_head_dim=8,
        qk_nope_head_dim=8,
        first_k_dense_replace=1,
        initializer_range=WIDE,
    )
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).eval()


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=WIDE)
    return MambaForCausalLM(config).eval()


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


@pytest.mark.parametrize(
    ("targets", "is_applied"), [(["attn"], True), (["out_proj"], False), (["attn", "out_proj"], False)]
)
def test_peft_applies_nothing_to_what_attention_reads_and_saving_says_so(targets, is_applied, tmp_path):
    import peft

    torch.manual_seed(0)
    model = Attends().eval()
    base, x = copy.deepcopy(model), torch.randn(2, 5, 16)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights="random")
    lowrank.inject(model, config)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lowrank.save_adapter(model, tmp_path)
    assert ["attn.out_proj learned" in str(one.message) for one in told] == ([] if is_applied else [True])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(loaded(x), model(x), **CLOSE) == is_applied


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def save(make, targets, folder):
    """The adapted model, and the warnings of saving it."""
    model = make()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    disturb(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowrank.save_adapter(model, folder)
    return model, [str(warning.message) for warning in caught if warning.category is LowrankWarning]


def by_peft(make, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(make(), folder).eval()


@pytest.mark.parametrize(
    ("make", "targets"),
    [(deepseek, ["kv_a_proj_with_mqa", "o_proj"]), (mamba, ["in_proj", "x_proj"]), (llama, ["gate_proj", "down_proj"])],
)
def test_what_is_not_warned_of_gives_pefts_answer(make, targets, tmp_path):
    model, said = save(make, targets, tmp_path)
    assert not said
    torch.testing.assert_close(logits(by_peft(make, tmp_path)), logits(model), **CLOSE)


def test_a_dense_or_shared_mlp_beside_experts_is_lost_in_peft_and_said(tmp_path):
    model, said = save(deepseek, ["gate_proj", "up_proj", "down_proj"], tmp_path)
    assert len(said) == 1 and "takes down_proj, gate_proj, up_proj for the routed experts of a deepseek_v3" in said[0]
    assert (logits(by_peft(deepseek, tmp_path)) - logits(model)).abs().max() > 0.05, "PEFT reads it now: say nothing"
    again = deepseek()
    lowrank.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_what_peft_refuses_is_said(tmp_path):
    _, said = save(mamba, ["in_proj", "out_proj"], tmp_path)
    assert len(said) == 1 and "refuses out_proj of a mamba" in said[0]
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        by_peft(mamba, tmp_path)


def test_the_tables_are_pefts():
    from peft import LoraConfig as Theirs
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check
    from peft.utils import transformers_weight_conversion as conversion

    theirs = {family: frozenset(names) for family, names in conversion._MOE_TARGET_MODULE_MAPPING.items()}
    assert theirs == EXPERTS
    for model_type in [*MAMBA, "llama", "jamba", "bamba", "mixtral"]:
        model = SimpleNamespace(config=SimpleNamespace(model_type=model_type), get_submodule=lambda path: None)
        for name in [*REFUSED, "in_proj", "x_proj"]:
            try:
                check(Theirs(), model, name)
                refused = False
            except ValueError:
                refused = True
            assert refused == bool(peft_faults(model, [f"layers.0.mixer.{name}"])), (model_type, name)
