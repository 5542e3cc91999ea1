"""The learning rate of `--lr auto`, from a model's family and width.

The rule and its numbers are tinker-cookbook's (Thinking Machines, 2026): 5e-5 · 10 · (2000/H)^P, H the hidden size; the
factor 10 is LoRA's beside full fine-tuning, whatever the rank; P was fitted on Llama and Qwen models.
"""

from typing import Any

from lowrank.errors import ConfigError

FULL, LORA, WIDTH = 5e-5, 10, 2000
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}  # by the beginning of a config's model_type
SOURCE = "tinker-cookbook's rule"


def auto_rate(model: Any, full: bool) -> float:
    """The rate for a model of transformers'. Raises ConfigError for a family that the rule was not fitted on."""
    config = model.config
    family = str(getattr(config, "model_type", ""))
    power = next((power for name, power in EXPONENTS.items() if family.startswith(name)), None)
    if power is None:
        raise ConfigError(
            f"--lr auto: the rule was fitted on Llama and Qwen models, and this is a {family or 'model of no family'}: "
            "give a number, and try three of them, each a third of the last"
        )
    width = float(config.get_text_config().hidden_size)
    rate: float = FULL * (1 if full else LORA) * (WIDTH / width) ** power
    return rate
