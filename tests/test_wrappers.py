"""A model that `lowrank.inject` adapted, inside what people put around models: Trainer, compile, DDP, FSDP2."""

import copy

import pytest
import torch
import transformers
from torch import nn

import lowrank
import models
from lowrank import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
PASSES = 3  # the first learns which layers share an input, the others compute them together


def adapted() -> nn.Module:
    model = models.build("AutoModelForCausalLM", "llama")
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights="random")
    lowrank.inject(model, config)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the plain path, which is differentiated by autograd alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank.layers.linear.reason_against", lambda *a: "asked for")
        model(input_ids=models.IDS, labels=models.IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys() and len(got) >= 28
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel() -> None:
    model = adapted()
    wanted = gradients(copy.deepcopy(model))
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(PASSES):
        wrapped.zero_grad()
        wrapped(input_ids=models.IDS, labels=models.IDS).loss.backward()
    assert_gradients({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, wanted)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("by", ["block", "layer"])
def test_fully_sharded_data_parallel(by: str) -> None:
    """By block a group's weights are whole when its first layer runs; by layer they are not, and none is computed
    ahead."""
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    wanted = gradients(copy.deepcopy(model))
    for block in model.model.layers:
        for layer in [m for m in block.modules() if isinstance(m, nn.Linear)] if by == "layer" else []:
            fully_shard(layer)
        fully_shard(block)
    fully_shard(model)
    for _ in range(PASSES):
        model.zero_grad()
        model(input_ids=models.IDS, labels=models.IDS).loss.backward()
    got = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    assert_gradients(got, wanted)


def losses(folder, settings: dict[str, bool]) -> list[float]:
    """The loss of each step of transformers' Trainer."""
    model = adapted()
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in models.IDS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), learning_rate=3e-1, per_device_train_batch_size=2, use_cpu=True, max_steps=8,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, seed=4, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({}, 1e-3), ({"gradient_checkpointing": True}, 1e-3), ({"bf16": True}, 3e-2)],
    ids=["plain", "checkpointing", "autocast"],
)
def test_transformers_trainer(settings: dict[str, bool], tolerance: float, tmp_path, monkeypatch) -> None:
    got = losses(tmp_path / "fused", settings)
    monkeypatch.setattr("lowrank.layers.linear.reason_against", lambda *a: "asked for")
    wanted = losses(tmp_path / "plain", settings)
    assert len(got) == 8 and abs(wanted[0] - wanted[-1]) > 0.1
    assert got == pytest.approx(wanted, rel=tolerance)


def test_compiled_switching_between_adapters_of_one_rank_compiles_once() -> None:
    torch._dynamo.reset()
    model = adapted()
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights="random")
    lowrank.inject(model, config, "second")
    block, x = model.model.layers[0].mlp, torch.randn(2, 5, 16, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for name in ("default", "second", "default"):
        lowrank.set_active(model, [name])
        with torch._dynamo.config.patch(error_on_recompile=name != "default"):
            got = compiled(x)
        torch.testing.assert_close(got, block(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), x)[0],
            torch.autograd.grad(block(x).square().sum(), x)[0],
            rtol=1e-3,
            atol=1e-4,
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dora_on_layers_without_bias_runs_fused_and_gives_the_plain_answers(dtype: torch.dtype) -> None:
    """The layers of a Llama have no bias: (W0 + ΔW)·x is one fused map there, rescaled by rows."""
    model = models.build("AutoModelForCausalLM", "llama").to(dtype)
    base = model(input_ids=models.IDS).logits
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_dora=True)
    plan = lowrank.inject(model, config)
    assert not plan.plain_paths and torch.equal(model(input_ids=models.IDS).logits, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter) * (1 if "magnitude" not in name else parameter))
    wanted = gradients(copy.deepcopy(model))
    assert any("magnitude" in name for name in wanted)
    for _ in range(PASSES):
        model.zero_grad()
        model(input_ids=models.IDS, labels=models.IDS).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
                assert error < (1e-5 if dtype is torch.float64 else 0.15), (name, error)
    merged = lowrank.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(
        merged(input_ids=models.IDS).logits,
        model(input_ids=models.IDS).logits,
        rtol=0.05,
        atol=1e-5 if dtype is torch.float64 else 0.1,
    )
