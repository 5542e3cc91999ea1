"""How training starts: each initialisation is what its paper or PEFT says, and starts at ΔW = 0 (but for "random")."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
import reference
from layer_cases import Holder, conv1d_linear, factors_of
from lowrank import LoraConfig
from lowrank.core.factors import LoraFactors
from lowrank.core.init import INITS, find_init
from lowrank.errors import ConfigError
from models import causal

D, K, R = 48, 64, 4


def started(init: str | bool, layer: nn.Module | None = None, **options: Any) -> LoraFactors:
    """The factors of one layer at step 0."""
    model = Holder(nn.Linear(K, D) if layer is None else layer)
    settings = {"r": R, "lora_alpha": 10, "target_modules": ["layer"], "init_lora_weights": init, **options}
    lowrank.inject(model, LoraConfig(**settings))
    (factors,) = factors_of(model)
    return factors.requires_grad_(False)


def orthonormal(rows: Tensor) -> bool:
    return torch.allclose(rows @ rows.t(), torch.eye(len(rows), dtype=rows.dtype), atol=1e-5)


def test_the_default_is_the_papers() -> None:
    assert LoraConfig().init_lora_weights == "gaussian"


@pytest.mark.parametrize("rank", [4, 16])
def test_gaussian_has_standard_deviation_one_over_rank(rank: int) -> None:
    factors = started("gaussian", nn.Linear(2000, 64), r=rank)
    assert factors.a.mean().abs() < 4 / rank / factors.a.numel() ** 0.5
    assert factors.a.std() == pytest.approx(1 / rank, rel=0.05)
    assert (factors.a.abs() > 2 / rank).float().mean() == pytest.approx(0.0455, abs=0.01)
    assert not factors.b.any()


@pytest.mark.parametrize("init", ["kaiming", True])
def test_kaiming_is_uniform_and_what_peft_draws(init: str | bool) -> None:
    factors = started(init, nn.Linear(400, 64), r=16)
    bound = 1 / math.sqrt(400)
    assert factors.a.abs().max() <= bound
    assert factors.a.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not factors.b.any()
    drawn = nn.init.kaiming_uniform_(torch.empty(16, 400), a=math.sqrt(5))
    assert drawn.std() == pytest.approx(float(factors.a.std()), rel=0.05)


@pytest.mark.parametrize("init", ["random", False])
def test_random_changes_the_model_at_once(init: str | bool) -> None:
    factors = started(init)
    assert factors.a.std() > 0.05
    assert factors.b.std() > 0.05
    assert factors.start_a is None


def test_orthogonal_has_orthonormal_halves_whose_product_is_exactly_zero() -> None:
    factors = started("orthogonal")
    half = R // 2
    assert orthonormal(factors.a[:half])
    assert orthonormal(factors.b[:, half:].t())
    assert not factors.a[half:].any()
    assert not factors.b[:, :half].any()
    assert not (factors.b @ factors.a).any()
    assert factors.start_a is None


def test_orthogonal_gives_both_factors_gradients_from_the_first_step() -> None:
    model = Holder(nn.Linear(K, D))
    lowrank.inject(model, LoraConfig(r=R, target_modules=["layer"], init_lora_weights="orthogonal"))
    model(torch.randn(5, K)).square().sum().backward()
    (factors,) = factors_of(model)
    assert factors.a.grad.any()
    assert factors.b.grad.any()


LAYERS = {
    "linear": lambda: nn.Linear(K, D),
    "conv1d-linear": lambda: conv1d_linear(D, K),
    "conv": lambda: nn.Conv2d(8, D, 3),
    "bfloat16": lambda: nn.Linear(K, D).bfloat16(),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [1, 4])
def test_pissa_starts_from_the_best_approximation_of_the_weight(layer: str, rank: int) -> None:
    base = LAYERS[layer]()
    weight = reference.matrix(base, base.weight.detach().double())
    factors = started("pissa", base, r=rank)
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :rank] * sigma[:rank] @ vh[:rank]
    assert torch.allclose(factors.scale * factors.b.double() @ factors.a.double(), best, atol=1e-4 * float(sigma[0]))
    assert torch.allclose(factors.a.double().norm(dim=1), (sigma[:rank] / factors.scale).sqrt(), rtol=1e-4)
    assert torch.allclose(factors.b.double().norm(dim=0), (sigma[:rank] / factors.scale).sqrt(), rtol=1e-4)
    assert torch.equal(factors.a, factors.start_a)
    assert torch.equal(factors.b, factors.start_b)


def test_fast_pissa_finds_nearly_the_best_approximation_with_iterations() -> None:
    layer = nn.Linear(K, D)
    with torch.no_grad():  # singular values that fall, as trained weights have
        u, _, vh = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_(u * torch.logspace(0, -3, len(u)) @ vh)
    best = torch.linalg.svdvals(layer.weight)[R:].norm()
    for name, slack in (("pissa_niter_0", 1.3), ("pissa_niter_4", 1.001), ("pissa_niter_16", 1.001)):
        factors = started(name, copy_of(layer))
        left = (layer.weight.detach() - factors.scale * factors.b @ factors.a).norm()
        assert best * 0.999 <= left <= best * slack, name


def copy_of(layer: nn.Module) -> nn.Module:
    """A plain layer with the same weight."""
    plain = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    return plain


def test_olora_starts_from_the_qr_decomposition() -> None:
    layer = nn.Linear(K, D)
    factors = started("olora", layer)
    assert orthonormal(factors.b.detach().t())
    assert torch.allclose(factors.b.t() @ layer.weight, factors.a, atol=1e-5)
    assert torch.equal(factors.a, factors.start_a)
    q = torch.linalg.qr(layer.weight).Q[:, :R]
    assert torch.allclose((q.t() @ factors.b).abs(), torch.eye(R), atol=1e-5)


@pytest.mark.parametrize("init", ["gaussian", "kaiming", True])
def test_lookups_start_with_no_column_for_any_token(init: str | bool) -> None:
    factors = started(init, nn.Embedding(200, 300))
    assert not factors.a.any()
    assert factors.b.std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("init", [name for name in INITS if name != "random"])
def test_parts_start_each_by_themselves(init: str) -> None:
    """Two parts hold two pairs (A, B), not one drawn twice; PiSSA's are those of the part's own rows."""
    model = causal("gpt2")
    module = model.transformer.h[0].attn.c_attn
    weight = module.weight.detach().t().clone()
    lowrank.inject(model, LoraConfig(r=R, lora_alpha=10, target_modules=["c_attn[q,v]"], init_lora_weights=init))
    factors = module.factors("default")
    assert factors.a.shape == (2 * R, 16)
    assert factors.b.shape == (2 * 16, R)
    assert not torch.equal(factors.a[:R], factors.a[R:])
    a, b = factors.effective()
    assert (b @ a).abs().max() <= 1e-5
    if init == "pissa":
        for i, rows in enumerate((slice(0, 16), slice(32, 48))):
            u, sigma, vh = torch.linalg.svd(weight[rows])
            best = u[:, :R] * sigma[:R] @ vh[:R]
            mine = factors.scale * factors.b[i * 16 : (i + 1) * 16] @ factors.a[i * R : (i + 1) * R]
            assert torch.allclose(mine, best, atol=1e-5)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4"])
def test_the_start_of_dora_has_gain_one(init: str | bool) -> None:
    layer = nn.Linear(K, D)
    norms = layer.weight.detach().norm(dim=1)
    factors = started(init, layer, use_dora=True)
    assert torch.allclose(factors.magnitude, norms, rtol=1e-4)


@pytest.mark.parametrize("init", [*INITS, "pissa_niter_2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_float32_masters_over_half_precision_bases(init: str, dtype: torch.dtype) -> None:
    factors = started(init, nn.Linear(K, D).to(dtype))
    assert {tensor.dtype for tensor in factors.parameters()} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in factors.parameters())


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "orthogonal"])
def test_starts_that_do_not_read_the_weight_need_no_values(init: str) -> None:
    factors = started(init, nn.Linear(K, D, device="meta"))
    assert {tensor.device.type for tensor in factors.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["gausian", "pissa_niter_", "pissa_niter_x", "", "eva"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} is not known: choose one of gaussian, .*pissa_niter_N"):
        find_init(name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_start_is_ours(init: str) -> None:
    """PEFT moves W0 and we keep it, but the factors that training starts from are the same up to signs."""
    import peft

    base = Holder(nn.Linear(K, D))
    ours = started(init, copy_of(base.layer))
    config = peft.LoraConfig(r=R, lora_alpha=10, target_modules=["layer"], init_lora_weights=init)
    other = peft.get_peft_model(base, config).base_model.model.layer
    theirs = other.scaling["default"] * other.lora_B["default"].weight @ other.lora_A["default"].weight
    wanted = ours.scale * ours.b @ ours.a
    assert torch.allclose(theirs, wanted, atol=1e-5)
