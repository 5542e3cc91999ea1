"""nano: the small decoder that ships with lowrank, the text it learned from, and a skill to teach it.

`--model nano` names it in every command; `AutoModelForCausalLM.from_pretrained(model_path())` loads it in transformers.
It is a Llama of a million weights that has read only what `world.py` writes; `scripts/train_nano.py` makes it again.
"""

from pathlib import Path

from lowrank.nano.skill import Row, rows

__all__ = ["Row", "model_path", "rows"]


def model_path() -> Path:
    """The folder of the shipped model, in transformers' format (config, weights, tokenizer)."""
    return Path(__file__).parent / "model"
