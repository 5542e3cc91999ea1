"""The fused kernels under the LoRA layers of an existing PEFT model, in place and undone at any time.

    report = lowrank.peft.accelerate(peft_model)
    print(report)                       # which layers run fused, which stay with PEFT, and why
    lowrank.peft.restore(peft_model)

Nothing but the class of the layers changes: parameters, names, hooks, state_dict and saved files stay PEFT's.
"""

from lowrank.peft.acceleration import accelerate, restore
from lowrank.peft.report import AccelerationReport, LayerPath

__all__ = ["AccelerationReport", "LayerPath", "accelerate", "restore"]
