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


VARIANTS = {
    "dora": ("llama", {"use_dora": True}),
    "dora over biases": ("gpt2", {"use_dora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora over biases": ("gpt2", {"init_lora_weights": "olora"}),
    "dora from pissa": ("gpt2", {"init_lora_weights": "pissa", "use_dora": True}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run_fused_start_at_the_base_and_give_the_plain_answers(variant: str, dtype: torch.dtype) -> None:
    """They are one fused map: rescaled by rows for DoRA, at twice the rank where start factors are taken off."""
    name, config = VARIANTS[variant]
    model = models.build("AutoModelForCausalLM", name).to(dtype).eval()
    torch.manual_seed(0)
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            nn.init.normal_(parameter)
    base = model(input_ids=models.IDS).logits
    targets = r"model\..*proj|transformer\..*c_(attn|fc|proj)"
    plan = lowrank.inject(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets, **config))
    assert not plan.plain_paths and torch.equal(model(input_ids=models.IDS).logits, base)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter) * (parameter if "magnitude" in path else 1))
    wanted = gradients(copy.deepcopy(model))
    assert any("magnitude" in path for path in wanted) == ("use_dora" in config)
    for _ in range(PASSES):
        model.zero_grad()
        model(input_ids=models.IDS, labels=models.IDS).loss.backward()
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                error = (parameter.grad - wanted[path]).norm() / wanted[path].norm()
                assert error < (1e-5 if dtype is torch.float64 else 0.15), (path, error)
    got = model(input_ids=models.IDS).logits
    merged = lowrank.merge_and_unload(copy.deepcopy(model))(input_ids=models.IDS).logits
    assert (merged - got).norm() <= (1e-5 if dtype is torch.float64 else 0.08) * got.norm()
