"""Write tests/goldens/trl_masks.json: which tokens of a few rows TRL's SFTTrainer trains, and which it makes of them.

Run with a Python that has trl beside what the tests need (`pip install trl`), from the root of the repository:

    PYTHONPATH=src:tests python scripts/trl_masks.py

Only the data side of the trainer is asked: its tokens and labels are made before the first step.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import LlamaForCausalLM

from chat_templates import byte_tokenizer
from mask_rows import ASSISTANT, CHATS, COMPLETION, STRINGS, messages
from train_models import llama_config, tokenizer

OUT = Path(__file__).parents[1] / "tests" / "goldens" / "trl_masks.json"
IGNORED = -100


def main() -> None:
    """Completions of every family, assistants where a template marks them, and strings."""
    completions = [{"prompt": messages(turns[:-1]), "completion": messages(turns[-1:])} for turns in CHATS]
    chats = [{"messages": messages(turns)} for turns in CHATS]
    strings = [{"prompt": prompt, "completion": completion} for prompt, completion in STRINGS]
    found = {
        "trl": trl.__version__,
        "completion": {name: masks(completions, byte_tokenizer(text)) for name, text in COMPLETION.items()},
        "assistant": {
            name: masks(chats, byte_tokenizer(text), assistant_only_loss=True) for name, text in ASSISTANT.items()
        },
        "strings": masks(strings, tokenizer(pad=True)),
    }
    OUT.write_text(lines(found) + "\n")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


def masks(rows: list[dict[str, Any]], tok: Any, **asked: Any) -> list[dict[str, list[int]]]:
    """{ids, trained} of every row: the tokens, and the places of those that are trained."""
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            folder, max_length=None, use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False, **asked
        )
        trainer = trl.SFTTrainer(
            LlamaForCausalLM(llama_config()), args=config, train_dataset=Dataset.from_list(rows), processing_class=tok
        )
    return [
        {"ids": row["input_ids"], "trained": [i for i, label in enumerate(row["labels"]) if label != IGNORED]}
        for row in trainer.train_dataset
    ]


def lines(value: Any, deep: int = 0) -> str:
    """JSON with a row a line."""
    if not isinstance(value, dict) or "ids" in value:
        if isinstance(value, list):
            return "[\n" + ",\n".join(" " * (deep + 1) + json.dumps(row) for row in value) + "\n" + " " * deep + "]"
        return json.dumps(value)
    inner = ",\n".join(f"{' ' * (deep + 1)}{json.dumps(name)}: {lines(v, deep + 1)}" for name, v in value.items())
    return "{\n" + inner + "\n" + " " * deep + "}"


if __name__ == "__main__":
    main()
