"""Other people's training programs: how an adapted model is handed to those that ask for a model of PEFT's.

    trainer = trl.DPOTrainer(lowrank.integrations.as_peft(model), ...)

transformers' Trainer and accelerate take the adapted model as it is. TRL, FSDP2 and DeepSpeed under Trainer ask whether
a model is PEFT's, to know that its adapter can be switched off, copied, merged and saved alone; `as_peft` answers them.
"""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from lowrank.integrations.peft_model import AdaptedModel


def as_peft(model: nn.Module) -> "AdaptedModel":
    """The adapted `model` as an instance of `peft.PeftModel`: a second object over the same modules and parameters.

    Nothing is copied or wrapped: names, hooks and `state_dict` keys are the model's own, and what one object trains is
    trained in the other. `disable_adapter`, `set_adapter`, `add_adapter` (a frozen copy, as a reference),
    `merge_adapter`, `unmerge_adapter`, `merge_and_unload`, `save_pretrained` and `load_adapter` do what PEFT's do, by
    lowrank's own functions. Needs peft. Such an object is given back as it is. Raises LowrankError for a model without
    adapters.
    """
    from lowrank.integrations.peft_model import AdaptedModel

    return model if isinstance(model, AdaptedModel) else AdaptedModel(model)


__all__ = ["as_peft"]
