"""The base in parts (`--shard`): of several processes each holds some rows of every frozen matrix, by torch's FSDP2.

Every block of the model is a group: its matrices are gathered when it runs, forward and backward, and let go when it
has run. What is in no block (table, head) is one group more, gathered from a forward to the end of its backward. What
is trained is in no group: adapters are put into a model that is in parts already, and modules that are trained in full
are left out, so that both are whole everywhere and are saved, resumed and added up as ever. Vectors (norms, biases)
are left out too: they are small, and an adapter may own them.

Nothing is ever held whole. transformers loads into a model on the meta device whose matrices are in parts already, and
takes of every tensor the rows that are this process's; the files are mapped until these are copied.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lowrank.errors import ConfigError
from lowrank.train import processes
from lowrank.train.models import OFFLINE

Whole = Callable[[Any], Collection[str]]


def is_in_parts(model: nn.Module) -> bool:
    """Whether processes hold parts of this model, so that each of its forwards is one of all of them."""
    if not distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@dataclass(frozen=True, slots=True)
class Parts:
    """Stands where one of transformers' auto classes does, and gives every process its part of what is loaded.

    whole: names of a model's modules (paths, or ends of them) that every process is to hold whole.
    """

    auto: Any
    device: torch.device
    whole: Whole

    def from_pretrained(self, folder: str, *, dtype: torch.dtype, **options: Any) -> Any:
        """As the auto class does. Raises ConfigError for a model in which no blocks are found."""
        from transformers import AutoConfig

        config, options = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **{**OFFLINE, **options})
        with torch.device("meta"):
            skeleton = self.auto.from_config(config, trust_remote_code=False)
        plain = type(skeleton)
        if not hasattr(plain, "maybe_distribute_model"):
            raise ConfigError("--shard needs a transformers that loads models in parts: pip install -U transformers")
        from transformers.distributed import DistributedConfig

        hooks = {
            "__module__": plain.__module__,
            "prepare_distribute_model": staticmethod(lambda how, device_map=None: (how, device_map, None)),
            "maybe_distribute_model": staticmethod(lambda model, *_: self._cut(model, plain)),
        }
        found = type(plain.__name__, (plain,), hooks).from_pretrained(  # type: ignore[attr-defined]
            folder, config=skeleton.config, distributed_config=DistributedConfig(), dtype=dtype, local_files_only=True,
            **options,
        )  # fmt: skip
        model = found[0] if isinstance(found, tuple) else found
        with torch.no_grad():
            model._apply(Tensor.clone)  # what was loaded may be rows of a mapped file, which stays mapped as long
        model.config.__dict__.pop("distributed_config", None)
        model._is_fsdp_managed_module = True  # by which `generate` keeps processes in step
        return found

    def _cut(self, model: nn.Module, plain: type[nn.Module]) -> nn.Module:
        model.__class__ = plain  # the class that loads has done its part
        put_in_parts(model, self.device, self.whole(model))
        return model


def put_in_parts(model: nn.Module, device: torch.device, whole: Collection[str]) -> None:
    """In place: of every matrix of a model on the meta device, this process's rows are left.

    Raises ConfigError where no blocks are found in it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = dict(blocks_of(model))
    if not blocks:
        raise ConfigError(
            f"--shard: no blocks are found in a {type(model).__name__}, whose weights could be gathered one after "
            "another; leave --shard out"
        )
    model.requires_grad_(False)
    kept = kept_whole(model, set(blocks), whole)
    mesh = init_device_mesh(device.type, (processes.count(),))
    for block in reversed(blocks.values()):  # those inside of others first
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        block.set_custom_all_gather(Gather())  # type: ignore[operator]
    fully_shard(model, mesh=mesh, ignored_params=kept)
    model.set_custom_all_gather(Gather())  # type: ignore[operator]


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, block): the members of lists of modules that the model says are not to be parted."""
    classes = set(getattr(model, "_no_split_modules", None) or ())
    listed = {id(m) for modules in model.modules() if isinstance(modules, nn.ModuleList) for m in modules}
    return ((p, m) for p, m in model.named_modules() if id(m) in listed and type(m).__name__ in classes)


def kept_whole(model: nn.Module, blocks: set[str], whole: Collection[str]) -> set[nn.Parameter]:
    """Vectors, what is in the modules named, and what several blocks share: a weight can be in one group alone."""
    owners: dict[nn.Parameter, set[str]] = {}
    kept = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        above = [name[:i] for i, letter in enumerate(name) if letter == "."]  # the modules that it is in
        owners.setdefault(parameter, set()).add(next((path for path in reversed(above) if path in blocks), ""))
        if parameter.dim() < 2 or any(f".{path}".endswith(f".{one}") for path in above for one in whole):
            kept.add(parameter)
    return kept | {parameter for parameter, owner in owners.items() if len(owner) > 1}


_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # its older name


class Gather:
    """How FSDP2 gathers the matrices of a group: torch's own way, where a process that was lost is said."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is gathered, and for what is given."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        """Every process's rows, one after another. Raises ProcessLost."""
        with processes.told():
            return _gather(output_tensor, input_tensor, group=group, async_op=async_op)
