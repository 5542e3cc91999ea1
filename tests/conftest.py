"""What every test stands on: no network, one thread unless asked, the same random numbers each time."""

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported anywhere

os.environ["LOWRANK_CACHE"] = tempfile.mkdtemp(prefix="lowrank-tests-")  # nothing of the user's is read or filled

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported anywhere

from hypothesis import HealthCheck, settings

atexit.register(shutil.rmtree, os.environ["LOWRANK_CACHE"], ignore_errors=True)

SHARED = Path(__file__).parents[2] / "shared"

settings.register_profile(
    "lowrank",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("lowrank")
torch.set_num_threads(int(os.environ.get("LOWRANK_TEST_THREADS", "1")))  # scripts/tour.py asks for two


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# these two patch by themselves: what a test undoes of its own (`monkeypatch.undo()`) is not the suite's
@pytest.fixture(autouse=True)
def _no_rows_are_few(request: pytest.FixtureRequest) -> Iterator[None]:
    """The tests' batches are small; where the module does not say `FEW_ROWS = True` they go through the kernels."""
    with pytest.MonkeyPatch.context() as suite:
        if not getattr(request.module, "FEW_ROWS", False):
            suite.setattr("lowrank.kernels.order.FEW_ROWS", 0)
        yield


@pytest.fixture(autouse=True)
def _no_pulse() -> Iterator[None]:
    """Commands do not say where they are, however slow the machine is: tests look at what else they say."""
    with pytest.MonkeyPatch.context() as suite:
        suite.setattr("lowrank.cli.pulse.FIRST", 3600.0)
        suite.setattr("lowrank.cli.pulse.EVERY", 3600.0)
        yield


@pytest.fixture
def shared() -> Path:
    """The folder of models and data beside the project; tests that need it are skipped where it is not."""
    if not SHARED.is_dir():
        pytest.skip("needs the models and data in ../shared, which are not here")
    return SHARED


@pytest.fixture
def _one_process() -> Iterator[None]:
    """torch.distributed with this process alone in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
