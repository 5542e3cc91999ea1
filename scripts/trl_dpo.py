"""Write tests/goldens/trl_dpo.json: what TRL's DPOTrainer makes of a few rows, its loss, figures and gradients.

Run with a Python that has trl beside what lowrank needs (`pip install trl`), from the root of the repository:

    PYTHONPATH=src:tests python scripts/trl_dpo.py

The weights are waves, not random numbers, so that every machine has the same ones.
"""

import json
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import LoraConfig

from dpo_model import BETA, RANK, ROWS, TARGETS, plain_model, wave
from train_models import tokenizer

OUT = Path(__file__).parents[1] / "tests" / "goldens" / "trl_dpo.json"


def main() -> None:
    """One batch of all rows through the real trainer."""
    tok = tokenizer(pad=True)
    config = LoraConfig(r=RANK, lora_alpha=4 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        asked = trl.DPOConfig(
            folder, beta=BETA, per_device_train_batch_size=len(ROWS), use_cpu=True, report_to=[], bf16=False,
            gradient_checkpointing=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            plain_model(), args=asked, train_dataset=Dataset.from_list(ROWS), processing_class=tok, peft_config=config
        )
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(wave(parameter.shape, short(name)))
        # in the order of the rows, without the trainer's shuffle
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
        loss.backward()
    figures = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    found = {
        "trl": trl.__version__,
        "ids": batch["input_ids"].tolist(),
        "attention": batch["attention_mask"].tolist(),
        "trained": batch["completion_mask"].tolist(),
        "loss": loss.item(),
        "figures": {name: value for name, value in figures.items() if name.startswith("rewards/")},
        "gradient_norms": {short(name): float(p.grad.norm()) for name, p in trained.items()},
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{OUT}: loss {loss.item():.6f}, {found['figures']}")


def short(name: str) -> str:
    """The name of a factor as both sides have it: model.layers.0.self_attn.q_proj.A."""
    path, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{path}.{factor[0]}"


if __name__ == "__main__":
    main()
