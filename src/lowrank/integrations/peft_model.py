"""An adapted model under PEFT's interface, as TRL and Trainer use it. Importing this file imports peft."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
from torch import Tensor, nn

from lowrank.checkpoint.load import load_adapter
from lowrank.checkpoint.pretrained import STATE, save_pretrained
from lowrank.checkpoint.read import read_safetensors
from lowrank.checkpoint.save import save_adapter
from lowrank.errors import LowrankError
from lowrank.injection.adapters import (
    active_adapters,
    adapter_configs,
    delete_adapter,
    disabled,
    lora_layers,
    override_modules,
    row_layers,
    set_active,
)
from lowrank.injection.config import LoraConfig
from lowrank.injection.saving import BaseIsThere, is_of_adapters
from lowrank.injection.state import require_state, unwrapped
from lowrank.integrations.sharding import check_sharding
from lowrank.layers.base import PREFIX
from lowrank.merge.memory import merge_and_unload, merged, unload

TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")  # what a module's tree hangs in


class AdaptedModel(peft.PeftModel):  # type: ignore[misc]  # peft has no types
    """The methods of a PeftModel over an adapted model's own modules; `base_model` is that model.

    Every call goes through the adapted model, with its hooks. What is not said here is the adapted model's attribute.
    """

    prefix = PREFIX  # of an adapter's parameters, as LoraModel says it

    def __init__(self, model: nn.Module) -> None:
        """Nothing of the model changes. Raises LowrankError where it has no adapter."""
        model = unwrapped(model)
        require_state(model)
        nn.Module.__init__(self)
        self.__dict__.update({table: model.__dict__[table] for table in TABLES})
        self.__dict__["base_model"] = model  # no child: the children are the model's own
        self.training = model.training
        self.peft_type = peft.PeftType.LORA
        self.special_peft_forward_args: frozenset[str] = frozenset()  # the model itself refuses what it does not know
        self._is_prompt_learning = False
        self._configs: dict[str, tuple[LoraConfig, peft.LoraConfig]] = {}
        self._references: set[str] = set()
        self._merged = ExitStack()
        self.is_merged = False
        self.register_load_state_dict_post_hook(BaseIsThere())

    def get_base_model(self) -> nn.Module:
        """The adapted model."""
        model: nn.Module = self.base_model
        return model

    def train(self, mode: bool = True) -> "AdaptedModel":
        """As every module's, for both objects; what cannot be trained or saved as it was set up is said here at last.

        Raises LowrankError where accelerate would save shards of an adapter, and under ZeRO's third stage.
        """
        check_sharding(self)
        self.base_model.training = mode
        super().train(mode)
        return self

    # which adapters there are

    @property
    def peft_config(self) -> dict[str, peft.LoraConfig]:
        """{name: config in PEFT's class} of every adapter; the same object for as long as the adapter is the same."""
        configs = adapter_configs(self.base_model)
        kept = {name: self._configs[name] for name in configs if self._configs.get(name, (None,))[0] is configs[name]}
        self._configs = kept | {
            name: (config, _in_peft(config, self.base_model)) for name, config in configs.items() if name not in kept
        }
        return {name: self._configs[name][1] for name in configs}

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that answer."""
        return list(active_adapters(self.base_model))

    @property
    def active_adapter(self) -> str:
        """The first of the adapters that answer; where none does, the first of all."""
        return (self.active_adapters or list(adapter_configs(self.base_model)))[0]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base's answers inside of the block."""
        with disabled(self.base_model):
            yield

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """These adapters answer, and are trained; a reference and what is set for inference are not."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        trained = [name for name in names if name not in self._references and not inference_mode]
        set_active(self.base_model, names, trained)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: peft.PeftConfig,
        low_cpu_mem_usage: bool = False,  # noqa: ARG002  PEFT's names; nothing here is so large
        autocast_adapter_dtype: bool = True,  # noqa: ARG002
    ) -> None:
        """A frozen copy, for a reference, of the adapter that has this very config; none where that adapter is new.

        A new adapter changes nothing yet, so that its reference is the base itself, which `disable_adapter` gives.
        Raises LowrankError for a config of no adapter: `lowrank.inject` is what makes new ones.
        """
        source = next((name for name, config in self.peft_config.items() if config is peft_config), None)
        if source is None:
            raise LowrankError(
                f"add_adapter makes copies of adapters that the model has: give it adapter {adapter_name!r} by "
                "lowrank.inject(model, LoraConfig(...), name)"
            )
        if _is_new(self.base_model, source):
            return
        state = require_state(self.base_model)
        active, trained = state.active, state.trained
        with TemporaryDirectory() as folder:
            save_adapter(self.base_model, folder, source, scales="own")
            load_adapter(self.base_model, folder, adapter_name)
        set_active(self.base_model, active, trained)
        self._references.add(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget one adapter."""
        delete_adapter(self.base_model, adapter_name)
        self._references.discard(adapter_name)

    # merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:  # noqa: ARG002
        """The active adapters folded into the weights, until `unmerge_adapter` puts the base's own bits back.

        `named_parameters` gives the merged model's then, under the base's names. Raises LowrankError where they are
        merged already, and for adapters that are not the active ones.
        """
        if adapter_names is not None and set(adapter_names) != set(self.active_adapters):
            raise LowrankError(f"merge_adapter: {adapter_names} are not the active adapters; set_adapter them first")
        self._merged.enter_context(merged(self.base_model))
        self.is_merged = True

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, bit for bit."""
        self.is_merged = False
        self._merged.close()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As every module's; while merged without those that belong to adapters or wait for their end."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if not (self.is_merged and is_of_adapters(name)):
                yield name, parameter

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,  # noqa: ARG002  all of lowrank's merges are
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The model with its adapters merged for good: `lowrank.merge_and_unload`."""
        return merge_and_unload(self.base_model, adapter_names, progress=progressbar)

    def unload(self) -> nn.Module:
        """The base without adapters: `lowrank.unload`."""
        return unload(self.base_model)

    # files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,  # noqa: ARG002  nothing else is written
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_of_peft: Any,
    ) -> None:
        """The adapters alone, as the adapted model's own `save_pretrained`; references are left out unless selected."""
        names = selected_adapters or [name for name in self.peft_config if name not in self._references]
        save_pretrained(self.base_model, save_directory, is_main_process, state_dict, push_to_hub, names)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        **_of_peft: Any,
    ) -> None:
        """The adapter in a folder, under this name; Trainer's checkpoints of this model give their very bits back."""
        state = Path(model_id) / STATE
        if adapter_name in self.peft_config and state.is_file():
            self.load_state_dict(read_safetensors(state), strict=False)
            return
        if adapter_name in self.peft_config:
            delete_adapter(self.base_model, adapter_name)
        load_adapter(self.base_model, model_id, adapter_name, trainable=is_trainable)


def _is_new(model: nn.Module, name: str) -> bool:
    """True where nothing of a plain adapter has been trained: every B is zero, and it owns no tensors in full."""
    factors = [layer.factors(name) for _, layer in lora_layers(model) if name in layer.adapter_names]
    plain = all(f.magnitude is None and f.start_a is None and not f.b.any() for f in factors)
    return plain and not any(override_modules(model, name)) and not any(row_layers(model, name))


def _in_peft(config: LoraConfig, model: nn.Module) -> peft.LoraConfig:
    """The config in PEFT's class, for those who read it: the adapter itself is made by ours alone."""
    same = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    names = ("target_modules", "target_parameters", "modules_to_save")
    return peft.LoraConfig(
        **{name: getattr(config, name) for name in same},
        **{name: _listed(getattr(config, name)) for name in names},
        base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
    )


def _listed(names: str | Sequence[str] | None) -> str | list[str] | None:
    return names if isinstance(names, str) else list(names or ()) or None
