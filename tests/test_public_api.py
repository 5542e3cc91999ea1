"""The public names, and what importing them costs."""

import os
import subprocess
import sys

import pytest

import lowrank

NAMES = {
    "InjectionPlan",
    "LoraConfig",
    "LoraFactors",
    "LowrankError",
    "LowrankWarning",
    "__version__",
    "active_adapters",
    "adapter_configs",
    "delete_adapter",
    "disabled",
    "functional",
    "inject",
    "load_adapter",
    "merge_and_unload",
    "merged",
    "plan",
    "read_adapter",
    "save_adapter",
    "set_active",
    "unload",
}


def test_every_public_name_is_there_and_documented() -> None:
    assert set(lowrank.__all__) >= NAMES
    assert dir(lowrank) == sorted(lowrank.__all__)
    for name in lowrank.__all__:
        value = getattr(lowrank, name)
        assert isinstance(value, str) or value.__doc__, name


def test_names_point_at_one_object_each() -> None:
    from lowrank.injection.apply import inject
    from lowrank.merge.memory import unload

    assert lowrank.inject is inject
    assert lowrank.unload is unload


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lowrank' has no attribute 'injekt'"):
        lowrank.injekt  # noqa: B018


HEAVY = ["transformers", "peft", "pyarrow", "rich", "matplotlib", "jinja2", "pydantic", "cyclopts", "triton", "yaml"]


@pytest.mark.parametrize(
    "use",
    [
        "import lowrank",
        "from lowrank import LoraConfig, inject, merge_and_unload, save_adapter, load_adapter",
        "import torch, lowrank; m = torch.nn.Sequential(torch.nn.Linear(3, 3)); "
        "lowrank.inject(m, lowrank.LoraConfig(r=2, target_modules=['0'])); lowrank.merge_and_unload(m)",
    ],
    ids=["import", "names", "use"],
)
def test_heavy_packages_are_not_imported_for_nothing(use: str) -> None:
    code = f"import sys; {use}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == []
