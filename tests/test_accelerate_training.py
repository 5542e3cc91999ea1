"""An accelerated PEFT model trains as PEFT's does: Trainer, TRL, checkpointing, autocast, compile, DDP."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import accelerate_models as models
from accelerate_models import answer, assert_same, config, counted, gradients, pair, peft_model, stir

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in models.IDS.repeat(4, 1)]
STEPS = 5


def run_of_trainer(model: nn.Module, folder: Path, **settings: object) -> list[float]:
    """The loss of each step of transformers' Trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{"learning_rate": 3e-2, "per_device_train_batch_size": 2, "use_cpu": True, "max_steps": STEPS} | settings,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=4,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=ROWS)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-4),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1e-4),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, 1e-4),
        ({"gradient_accumulation_steps": 2}, 1e-4),
        ({"bf16": True}, 2e-2),
    ],
    ids=["plain", "checkpointing-reentrant", "checkpointing", "accumulation", "autocast"],
)
def test_transformers_trainer(settings, tolerance, tmp_path, monkeypatch):
    plain, fast = pair(peft_model())
    want = run_of_trainer(plain, tmp_path / "plain", **settings)
    with counted(monkeypatch) as ranks:
        got = run_of_trainer(fast, tmp_path / "fast", **settings)
    assert len(ranks) >= 14 * STEPS
    assert len(want) == STEPS and abs(want[0] - want[-1]) > 0.1
    assert got == pytest.approx(want, rel=tolerance)


def test_a_bfloat16_model_in_the_trainer(tmp_path):
    plain, fast = pair(stir(peft_model(dtype=torch.bfloat16), std=0.05))
    want, got = run_of_trainer(plain, tmp_path / "plain"), run_of_trainer(fast, tmp_path / "fast")
    assert abs(want[0] - want[-1]) > 0.1
    assert got == pytest.approx(want, rel=2e-2)
    assert all(p.dtype is torch.float32 for p in fast.parameters() if p.requires_grad)


def test_trl_sft_trainer(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="TRL is no dependency: pip install trl runs this test")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 64)}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[PAD]", unk_token="[UNK]"
    )
    losses, calls = [], []
    for model in pair(peft_model()):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / str(len(losses))),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=3e-2,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )
        with counted(monkeypatch) as ranks:
            trainer.train()
        calls.append(len(ranks))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == STEPS and abs(losses[0][0] - losses[0][-1]) > 0.1
    assert calls[0] == 0 and calls[1] >= 14 * STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    _, fast = pair(peft_model())
    want = gradients(fast)
    fast.train()
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(fast)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_under_checkpointing_draws_the_same_mask_again(reentrant):
    _, fast = pair(peft_model(lora_dropout=0.4))
    fast.train()
    seen = []
    for checkpointed in (False, True):
        if checkpointed:
            fast.enable_input_require_grads()
            fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(12)
        seen.append(gradients(fast))
    for name in seen[0]:
        torch.testing.assert_close(seen[1][name], seen[0][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, monkeypatch):
    plain, fast = pair(stir(peft_model(), std=0.05))
    exact = answer(plain).detach()
    want_gradients = gradients(plain)
    with torch.autocast("cpu", dtype), counted(monkeypatch) as ranks:
        by_peft, ours = answer(plain), answer(fast)
    assert len(ranks) == 14
    assert ours.dtype is by_peft.dtype is dtype
    assert (ours - exact).norm() < 1.5 * (by_peft - exact).norm()
    with torch.autocast("cpu", dtype):
        got, by_peft = gradients(fast), gradients(plain)
    for name, want in want_gradients.items():
        assert got[name].dtype is torch.float32
        assert (got[name] - want).norm() < 2 * (by_peft[name] - want).norm() + 1e-3 * want.norm(), name


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_torch_compile_takes_the_whole_graph(monkeypatch):
    plain, fast = pair(peft_model())
    block = fast.base_model.model.model.layers[0].mlp
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 32, requires_grad=True)
    with counted(monkeypatch) as ranks:
        got = compiled(x)
    assert not ranks
    want = plain.base_model.model.model.layers[0].mlp(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), x)[0],
        torch.autograd.grad(want.square().sum(), x)[0],
        rtol=1e-3,
        atol=1e-4,
    )
    assert_same(plain, fast)  # uncompiled calls run fused as before


@pytest.mark.usefixtures("_fresh_compiler")
def test_torch_compile_of_the_model():
    plain, fast = pair(peft_model())
    compiled = torch.compile(fast, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=models.IDS).logits, answer(plain), rtol=1e-4, atol=1e-5)


def test_jit_trace_records_plain_operations():
    net = nn.Sequential(nn.Linear(6, 5))
    plain, fast = pair(stir(models.peft.get_peft_model(net, config(target_modules=["0"]))))
    traced = torch.jit.trace(fast.base_model.model, torch.randn(3, 6))
    x = torch.randn(4, 6)
    torch.testing.assert_close(traced(x), plain(x))


def test_torch_func_transforms():
    plain, fast = pair(peft_model(target_modules=["q_proj"]))
    grads = []
    for model in (plain, fast):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
        grads.append(torch.func.vmap(torch.func.grad(lambda row, layer=layer: layer(row).square().sum()))(x))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel(monkeypatch):
    plain, fast = pair(peft_model())
    wrapped = nn.parallel.DistributedDataParallel(fast)
    with counted(monkeypatch) as ranks:
        for _ in range(2):  # the second pass fails where the first left a parameter unreduced
            wrapped.zero_grad()
            wrapped(input_ids=models.IDS, labels=models.IDS).loss.backward()
    assert len(ranks) == 28
    for (name, want), got in zip(
        gradients(plain).items(), (p for p in fast.parameters() if p.requires_grad), strict=True
    ):
        torch.testing.assert_close(got.grad, want, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.usefixtures("_one_process")
def test_fully_sharded_data_parallel(monkeypatch):
    from torch.distributed.fsdp import fully_shard

    plain, fast = pair(peft_model())
    want = gradients(plain)
    sharded = copy.deepcopy(fast)
    for block in sharded.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    with counted(monkeypatch) as ranks:
        sharded(input_ids=models.IDS, labels=models.IDS).loss.backward()
    assert len(ranks) == 14  # whole tensors are in place while a block runs
    got = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)
