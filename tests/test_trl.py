"""TRL's trainers over an adapted model and over an accelerated PEFT model, beside TRL over PEFT's own.

TRL is no dependency: `pip install -e '.[trl]'` runs these.
"""

import copy

import pytest
import torch

import lowrank
from accelerate_models import counted
from checkpoint_models import contents, disturb, llama, word_tokenizer
from lowrank import LoraConfig
from lowrank.integrations import as_peft

trl = pytest.importorskip("trl", reason="TRL is no dependency: pip install -e '.[trl]' runs this test")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
STEPS = 3
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "lowrank.json"}
PROMPTS = [f"w{5 + i} w{7 + i} w{9 + i}" for i in range(8)]
PAIRS = [{"prompt": p, "chosen": f" {p} w11", "rejected": f" w4 w{n % 5 + 12}"} for n, p in enumerate(PROMPTS)]
ROWS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


def dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def longer(completions, **_columns):
    """A reward of GRPO's: the distinct words."""
    return [float(len(set(text.split()))) for text in completions]


def trainer(kind, model, folder, **options):
    """TRL's trainer of that kind over the model."""
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-2,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "report_to": [],
        "save_steps": 2,
        "disable_tqdm": True,
        "seed": 4,
        "gradient_checkpointing": False,
    } | options
    own = {"processing_class": word_tokenizer()}
    if kind == "sft":
        arguments = trl.SFTConfig(**settings)
        return trl.SFTTrainer(model, args=arguments, train_dataset=dataset(ROWS), **own)
    if kind == "dpo":
        arguments = trl.DPOConfig(**settings, beta=0.5)
        return trl.DPOTrainer(model, args=arguments, train_dataset=dataset(PAIRS), **own)
    rows = dataset([{"prompt": prompt} for prompt in PROMPTS])
    arguments = trl.GRPOConfig(**settings, beta=0.5, num_generations=2, max_completion_length=6)
    return trl.GRPOTrainer(model, reward_funcs=longer, args=arguments, train_dataset=rows, **own)


def losses(made):
    """The loss of every step, and the reference's part in it where there is one."""
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    return [entry[name] for entry in log for name in ("loss", "rewards/margins", "kl") if name in entry]


def adapted(fresh=False):
    model = llama()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "up_proj"]))
    return model if fresh else disturb(model)


@pytest.fixture
def of_peft(tmp_path):
    """PEFT's own model with the same adapter; PEFT with a fresh one where asked."""

    def make(fresh=False):
        folder = tmp_path / f"start {fresh}"
        if not folder.exists():
            lowrank.save_adapter(adapted(fresh), folder)
        return peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True)

    return make


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("fresh", [False, True], ids=["trained on", "new"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trl_trains_as_over_pefts_model(kind, fresh, options, of_peft, tmp_path, monkeypatch):
    wanted = losses(trainer(kind, of_peft(fresh), tmp_path / "peft", **options))
    model = adapted(fresh)
    base = {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    made = trainer(kind, as_peft(model), tmp_path / "ours", **options)
    assert getattr(made, "ref_model", None) is None
    ours = losses(made)
    assert len(wanted) >= STEPS and any(abs(loss) > 1e-4 for loss in wanted)
    assert ours == pytest.approx(wanted, rel=2e-3, abs=2e-4)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    fast = of_peft(fresh)
    lowrank.peft.accelerate(fast)
    with counted(monkeypatch) as calls:
        accelerated = losses(trainer(kind, fast, tmp_path / "fast", **options))
    assert calls and accelerated == pytest.approx(wanted, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_saves_the_adapter_alone_and_resumes_to_the_same_bits(kind, tmp_path):
    whole = adapted()
    made = trainer(kind, as_peft(whole), tmp_path / "whole")
    made.train()
    made.save_model(str(tmp_path / "end"))
    files = set(contents(tmp_path / "end"))
    assert files >= ADAPTER and not {"config.json", "model.safetensors", "pytorch_model.bin"} & files
    resumed = adapted()
    again = trainer(kind, as_peft(resumed), tmp_path / "resumed")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    state = whole.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.state_dict().items())
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "end").eval()
    ids = torch.arange(3, 23).view(2, 10)
    torch.testing.assert_close(loaded(ids).logits, copy.deepcopy(whole).eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_sft_takes_the_adapted_model_as_it_is(tmp_path):
    itself, view = adapted(), adapted()
    assert losses(trainer("sft", itself, tmp_path / "a")) == losses(trainer("sft", as_peft(view), tmp_path / "b"))
