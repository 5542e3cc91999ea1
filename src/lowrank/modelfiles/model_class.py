"""What the class of a base's model says of its experts, where shapes leave it open: built without a weight."""

import torch

from lowrank.errors import CheckpointError
from lowrank.layers.stack import ExpertStack, kind_of_stack, stacks_of
from lowrank.modelfiles.base import BaseFiles


def experts_of_class(base: BaseFiles) -> str:
    """The layer kind of the model's stacks of experts, of which every class has one.

    Raises CheckpointError for a config that is of no class of transformers, or of one without such stacks.
    """
    if stacks := stacks_of_class(base):
        return kind_of_stack(next(iter(stacks.values()))).kind
    import transformers

    raise CheckpointError(
        f"{base.label}: its experts are square matrices, and its config.json names no model of transformers "
        f"{transformers.__version__} that says which way round: load the model and use merge_and_unload"
    )


def stacks_of_class(base: BaseFiles) -> dict[str, ExpertStack]:
    """{name of the parameter: a stack without numbers} of the model's first module of experts; empty without one."""
    import transformers

    names = (base.config or {}).get("architectures") or []
    known = [getattr(transformers, name) for name in names if isinstance(name, str) and hasattr(transformers, name)]
    if known:
        config = transformers.AutoConfig.from_pretrained(str(base.folder), local_files_only=True)
        with torch.device("meta"):
            model = known[0](config)
        for module in model.modules():
            if stacks := stacks_of(module):
                return stacks
    return {}
