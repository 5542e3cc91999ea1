"""Stacks of experts in four or eight bits: as the dense model of their numbers, read expert by expert, merged alike."""

import copy
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from expert_models import EVERY_STACK, IDS, IMPLEMENTATIONS, adapted, answer, mixture
from lowrank import LoraConfig
from lowrank.core.stored.fourbit import FourBit
from lowrank.core.stored.of_module import stored_weight
from lowrank.core.stored.of_stack import HELD
from lowrank.core.stored.scaled import Int8Rows
from lowrank.core.stored.stack import OneAboveAnother, StoredStack
from lowrank.errors import LowrankWarning, MergeError, TargetError
from lowrank.injection.adapters import lora_layers
from lowrank.injection.quantise import quantise_stacks, quantised_stack, what_is_held
from lowrank.injection.traversal import base_modules
from lowrank.layers.stack import ExpertStack
from lowrank.study.estimate.estimate import estimate
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.train import held_experts
from lowrank.train.adapting import adapt
from lowrank.train.held import load_held
from lowrank.train.settings import EvalSettings, TrainSettings
from lowrank.train.task import Loaded
from quantised_models import dequantised

bnb = pytest.importorskip("bitsandbytes")
FAMILIES = ("mixtral", "gpt_oss", "llama4_text", "nemotron_h")  # rows, transposed, all at once, no gate
CASES = [(f, way) for f in FAMILIES for way in IMPLEMENTATIONS if f != "llama4_text" or way == "eager"]
SCHEMES = [("nf4", False), ("nf4", True), ("int8", False)]


def stacks(model: nn.Module) -> dict[str, Any]:
    """{path: stack} of a model."""
    return {path: module for path, module in base_modules(model) if isinstance(module, ExpertStack)}


def held(family: str, way: str = "grouped_mm", scheme: str = "nf4", double: bool = False) -> nn.Module:
    """A mixture whose stacks alone are quantised, so that all else has the bits of the float model."""
    model = mixture(family, way)
    quantise_stacks(model, scheme, double=double)
    return model


def numbers_of(model: nn.Module) -> nn.Module:
    """The plain model with the numbers that the quantised one's stacks hold."""
    plain = copy.deepcopy(model)
    lowrank.inject(plain, LoraConfig(**EVERY_STACK))
    return lowrank.merge_and_unload(plain)


@pytest.mark.parametrize(("scheme", "double"), SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_held_as_bitsandbytes_holds_a_linear_layer(family: str, scheme: str, double: bool) -> None:
    plain = mixture(family)
    model = held(family, scheme=scheme, double=double)
    for path, stack in stacks(model).items():
        weight = stacks(plain)[path].weight
        got = stored_weight(stack).matrix()
        assert got.shape == weight.shape and type(stack.weight) is nn.Parameter and not stack.weight.is_floating_point()
        halves = 2 if family == "mixtral" and path.endswith("gate_up_proj") else 1
        for one, matrix in zip(got, weight, strict=True):
            turned = family in ("gpt_oss", "llama4_text")
            rows = (one.t() if turned else one).chunk(halves)
            for part, wanted in zip(rows, (matrix.t() if turned else matrix).chunk(halves), strict=True):
                assert torch.equal(part, by_bitsandbytes(wanted.contiguous(), scheme, double))
    assert what_is_held(model).stacks == what_is_held(model).all_stacks == len(stacks(model)) > 0


def by_bitsandbytes(weight: Tensor, scheme: str, double: bool) -> Tensor:
    if scheme == "int8":
        return bnb.functional.int8_vectorwise_dequant(*bnb.functional.int8_vectorwise_quant(weight.half())[:2])
    return dequantised(*bnb.functional.quantize_4bit(weight.detach(), quant_type=scheme, compress_statistics=double))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Weak references to every dense matrix that is read; a whole stack is read by nobody."""
    found: list[Any] = []

    def refuse(*_: object) -> None:
        raise AssertionError("a whole stack was read")

    monkeypatch.setattr(StoredStack, "rows", refuse)
    for form in (FourBit, Int8Rows, OneAboveAnother):
        own = form.rows

        def watched(self: Any, *args: Any, own: Any = own) -> Tensor:
            matrix = own(self, *args)
            found.append(weakref.ref(matrix))
            assert sum(1 for one in found if one() is not None) <= 3  # one expert's: two halves, and both together
            return matrix

        monkeypatch.setattr(form, "rows", watched)
    yield found


@pytest.mark.parametrize(("family", "way"), CASES)
def test_answers_and_gradients_are_those_of_the_dense_model(
    family: str, way: str, request: pytest.FixtureRequest
) -> None:
    model = held(family, way, double=True)
    dense = adapted(numbers_of(model))
    adapted(model)
    both = [[p for _, layer in lora_layers(m) for p in layer.factors("default").trainable()] for m in (model, dense)]
    wanted = answer(dense)
    direction = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * direction).sum(), both[1])
    request.getfixturevalue("read")
    got = answer(model)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad((got * direction).sum(), both[0]), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
        assert other.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_nothing_dense_is_kept_and_experts_without_tokens_are_not_read(
    scheme: str, request: pytest.FixtureRequest
) -> None:
    model, read = held("mixtral", scheme=scheme), request.getfixturevalue("read")
    adapted(model)  # which reads one expert at a time too
    asked: list[int] = []
    for stack in stacks(model).values():
        stored, own = stack.stored_stack, type(stack.stored_stack).of_expert
        object.__setattr__(stored, "of_expert", lambda e, s=stored, o=own: (asked.append(e), o(s, e))[1])
    loss = model(input_ids=IDS[:1, :1]).logits.sum()
    assert read and not [one for one in read if one() is not None], "a dense matrix is kept for backward"
    assert len(asked) == 2 * len(stacks(model)), "one token goes to two experts of each layer"
    forward = len(read)
    loss.backward()
    assert len(read) > forward and not [one for one in read if one() is not None]
    for _, layer in lora_layers(model):
        assert (layer.factors("default").b.grad.flatten(1).abs().sum(1) > 0).sum() == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_merged_is_adapted_and_unloading_gives_the_quantised_base_back(family: str, scheme: str) -> None:
    model = held(family, scheme=scheme)
    before, state = answer(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = adapted(numbers_of(model))
    adapted(model)
    got = answer(model)
    assert (got - before).abs().max() > 0.01
    with lowrank.disabled(model):
        assert torch.equal(answer(model), before)
    with lowrank.merged(model):
        torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer(model), got)
    copied = copy.deepcopy(model)
    lowrank.unload(model)
    assert torch.equal(answer(model), before) and what_is_held(model).stacks == len(stacks(model))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    plain = lowrank.merge_and_unload(copied).state_dict()
    wanted = lowrank.merge_and_unload(dense).state_dict()
    assert plain.keys() == wanted.keys() and all(torch.equal(plain[name], wanted[name]) for name in plain)
    assert {type(m) for m in copied.modules()} == {type(m) for m in mixture(family).modules()}
    assert not any(HELD in module.__dict__ for module in copied.modules())


def test_an_adapter_of_some_stacks_leaves_the_others_quantised_and_read() -> None:
    model = held("mixtral")
    dense = numbers_of(model)
    lowrank.inject(model, LoraConfig(r=2, target_modules=(), target_parameters=["down_proj"]))
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-4, atol=1e-5)


def test_it_is_moved_cast_copied_and_pickled_with_its_scales() -> None:
    model = held("mixtral", double=True)
    wanted = {path: stored_weight(stack).matrix() for path, stack in stacks(model).items()}
    for other in (model.bfloat16().float(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for path, stack in stacks(other).items():
            assert torch.equal(stored_weight(stack).matrix(), wanted[path])
            assert stored_weight(stack).held.data_ptr() == stack.weight.data_ptr()
    assert stacks(model.to("meta"))["model.layers.0.mlp.experts.down_proj"].stored_stack.device.type == "meta"


def test_under_autocast_checkpointing_dropout_and_two_adapters() -> None:
    model = held("mixtral")
    dense = numbers_of(model)
    for one in (model, dense):
        adapted(one, "first", lora_dropout=0.0)
        adapted(one, "second", seed=2)
        lowrank.set_active(one, ["first", "second"])
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(answer(model), answer(dense), rtol=0.1, atol=0.1)
    model.train().gradient_checkpointing_enable()
    model(input_ids=IDS).logits.sum().backward()


def test_onto_quantised_says_what_is_left_and_keeps_the_form() -> None:
    model = adapted(held("mixtral", double=True))
    with pytest.raises(MergeError, match=r"onto quantised: \d of 4 modules would keep less"):
        for _, layer in lora_layers(model):
            layer.factors("default").b.data.mul_(1e-3)
        lowrank.merge_and_unload(model, onto="quantised")
    for _, layer in lora_layers(model):
        layer.factors("default").b.data.mul_(1e3)
    sums = {path: layer.merged_weight(("default",)) for path, layer in lora_layers(model)}
    lowrank.merge_and_unload(model, onto="quantised")
    assert what_is_held(model).form == "NF4, double quantised" and what_is_held(model).stacks == 4
    for path, wanted in sums.items():
        assert (stored_weight(stacks(model)[path]).matrix() - wanted).norm() / wanted.norm() < 0.12


def test_onto_the_original_in_memory_and_in_files(tmp_path) -> None:
    plain = mixture("mixtral")
    plain.save_pretrained(tmp_path / "float")
    models = [adapted(held("mixtral")) for _ in range(2)]
    wanted = lowrank.merge_and_unload(adapted(mixture("mixtral"))).state_dict()
    for model, original in zip(models, (plain, tmp_path / "float"), strict=True):
        with pytest.warns(LowrankWarning, match="apart from what was trained"):
            lowrank.merge_and_unload(model, onto="original", original=original)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(MergeError, match="no weight of numbers, of the same shape"):
        lowrank.merge_and_unload(adapted(held("mixtral")), onto="original", original=mixture("qwen3_moe"))


def test_the_adapter_remembers_the_form_and_says_where_another_base_differs(tmp_path) -> None:
    lowrank.save_adapter(adapted(held("gpt_oss")), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LowrankWarning)
        lowrank.load_adapter(held("gpt_oss"), tmp_path / "adapter")
    with pytest.warns(LowrankWarning, match=r"trained over a base held in NF4, and this one is held in float32"):
        lowrank.load_adapter(mixture("gpt_oss"), tmp_path / "adapter")


@pytest.mark.parametrize("targets", ["down_proj", r".*\.experts\.\w+"], ids=["one stack", "all"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "llama4_text"])
def test_a_merge_on_disk_into_the_float_base_has_the_bits_of_that_in_memory(
    family: str, targets: str, tmp_path
) -> None:
    mixture(family).bfloat16().save_pretrained(tmp_path / "base")
    asked = EvalSettings(model="m", data="d", quantise="nf4", double=True)
    model = load_held(tmp_path / "base", asked, torch.bfloat16, torch.device("cpu"), [])
    lowrank.inject(
        model,
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj"],
            target_parameters=[targets] if targets == "down_proj" else targets,
        ),
    )
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.factors("default").b.normal_(std=0.1)
    lowrank.save_adapter(model, tmp_path / "adapter")
    report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    assert any("quantised again as in the training" in note for note in report.notes), report.notes
    lowrank.merge_and_unload(model)
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    wanted = model.state_dict()
    assert loaded.keys() == wanted.keys()
    assert [name for name in loaded if not torch.equal(loaded[name], wanted[name])] == []


def test_estimate_counts_experts_as_they_are_held(tmp_path) -> None:
    mixture("mixtral").save_pretrained(tmp_path)
    asked = {"model": str(tmp_path), "max_length": 16, "targets": "all-linear", "rank": 2, "dtype": "bfloat16"}
    plain, four = (estimate(EstimateSettings(**asked, **more)) for more in ({}, {"quantise": "nf4", "double": True}))
    held = lowrank.quantise(mixture("mixtral").bfloat16(), "nf4", double=True)
    assert held.stacks == 4 and plain.weights - four.weights == held.plain_bytes - held.bytes


def in_fp8(model: nn.Module) -> nn.Module:
    """The model with transformers' FP8Experts; in place: its own stacks have the numbers that these hold."""
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from transformers.integrations.moe import use_experts_implementation

    made = use_experts_implementation(
        experts_class=integration.FP8Experts, experts_interface=integration.ALL_FP8_EXPERTS_FUNCTIONS
    )
    other = copy.deepcopy(model)
    for ours, layer in zip(model.model.layers, other.model.layers, strict=True):
        layer.mlp.experts = made(model.config, block_size=(32, 16)).requires_grad_(False)
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(ours.mlp.experts, name).data
            numbers, scales = (layer.mlp.experts._parameters[f"{name}{end}"].data for end in ("", "_scale_inv"))
            scales.copy_(torch.rand_like(scales) * 0.05 + 0.01)
            spread = scales.repeat_interleave(32, 1).repeat_interleave(16, 2)[:, : weight.shape[1], : weight.shape[2]]
            numbers.copy_(weight / spread)
            weight.copy_(numbers.float() * spread)
    return other


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_transformers_fp8_experts_answer_as_their_numbers_on_any_machine(way: str) -> None:
    dense = mixture("mixtral", way).requires_grad_(False)
    model = in_fp8(dense)
    lowrank.inject(model, LoraConfig(r=2, target_modules=(), target_parameters=["down_proj"]), "some")
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-4, atol=1e-5)
    lowrank.unload(model)
    adapted(model), adapted(dense)
    got, wanted = answer(model), answer(dense)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    got.square().sum().backward(), wanted.square().sum().backward()
    for (_, one), (_, other) in zip(lora_layers(model), lora_layers(dense), strict=True):
        gradient = other.factors("default").b.grad
        torch.testing.assert_close(one.factors("default").b.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max())
    with pytest.raises(MergeError, match="their class holds FP8 alone: merge on disk"):
        lowrank.merge_and_unload(model)
    lowrank.unload(model)
    assert {type(layer.mlp.experts).__name__ for layer in model.model.layers} == {"FP8Experts"}


def test_stacks_that_a_parametrisation_computes_are_refused_in_a_sentence() -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = mixture("mixtral")
    replace_parameter_4bit(model.model.layers[0].mlp.experts, "down_proj")
    with pytest.raises(TargetError, match=r"layers\.0\.mlp\.experts\.down_proj, which a parametrisation computes"):
        lowrank.inject(model, LoraConfig(target_modules=(), target_parameters=["layers.0.mlp.experts.down_proj"]))


@pytest.mark.parametrize(("family", "scheme"), [("mixtral", "nf4"), ("mixtral", "int8"), ("gpt_oss", "nf4")])
def test_a_stack_is_quantised_when_it_has_been_read_and_no_other_is_dense(
    family: str, scheme: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture(family).save_pretrained(tmp_path / "base")
    found: list[Any] = []

    def watched(experts: Any, name: str, weight: Tensor, *others: Any) -> Any:
        assert not [one for one in found if one() is not None], "another stack is dense still"
        found.append(weakref.ref(weight))
        return quantised_stack(experts, name, weight, *others)

    monkeypatch.setattr(held_experts, "quantised_stack", watched)
    asked = EvalSettings(model="m", data="d", quantise=scheme)
    model = load_held(tmp_path / "base", asked, torch.float32, torch.device("cpu"), [])
    wanted = stacks(held(family, scheme=scheme))
    assert len(found) == len(wanted) > 0 and not hasattr(model, "hf_quantizer")
    for path, stack in stacks(model).items():
        assert torch.equal(stored_weight(stack).matrix(), stored_weight(wanted[path]).matrix())
    kept = load_held(tmp_path / "base", asked, torch.float32, torch.device("cpu"), ["experts"])
    assert what_is_held(kept).stacks == 0 and what_is_held(kept).layers == what_is_held(model).layers


@pytest.mark.parametrize(
    "asked",
    [
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "use_dora": True},
        {"target_parameters": ["gate_up_proj[gate,up]", "experts.down_proj"]},
        {"target_parameters": ["experts.gate_up_proj"], "init_lora_weights": "pissa"},
    ],
    ids=["dora", "gate and up apart", "pissa"],
)
@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_every_kind_of_adapter_is_that_of_the_dense_model(way: str, asked: dict[str, Any]) -> None:
    model = held("mixtral", way)
    dense = numbers_of(model)
    for one in (model, dense):
        adapted(one, **asked | {"target_modules": ()})
    got = answer(model)
    torch.testing.assert_close(got, answer(dense), rtol=1e-4, atol=1e-5)
    merged, wanted = (lowrank.merge_and_unload(one).state_dict() for one in (model, dense))
    assert merged.keys() == wanted.keys() and all(torch.equal(merged[name], wanted[name]) for name in merged)
    torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)


def test_stacks_that_loftq_passes_over_are_said(tmp_path) -> None:
    base = tmp_path / "base"
    mixture("mixtral").save_pretrained(base)
    asked = TrainSettings(model=str(base), data="d", out="o", quantise="nf4", init="loftq", targets="all-linear")
    model = load_held(base, asked, torch.float32, torch.device("cpu"), [])
    said = adapt(Loaded(model, None, torch.device("cpu"), 0), asked, base)
    several = sum(1 for _ in lora_layers(model))
    experts = len(stacks(mixture("mixtral")))
    assert f"; {several - experts} layers start from what quantising took off; {experts} others" in said
