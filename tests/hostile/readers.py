"""A fuzz target for the readers of adapters: PEFT's, lowrank.json, GGUF, mlx-lm's, loralib's and old pickles.

Every reader of a damaged file answers or raises a LowrankError, in 10 seconds and a gigabyte, and a model that an
adapter cannot be loaded onto stays plain.

    python tests/hostile/readers.py --cases 100000 [--seed 0] [--keep tests/hostile]

Damage is by structure (a field × a wrong value, a number of a header × an extreme one, a tensor × another shape, dtype
or name) and by bytes. What breaks the promise is kept as a folder `reader-HASH`, which the test suite reads again.
"""

import functools
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import fuzz  # noqa: E402
import running  # noqa: E402
import torch  # noqa: E402

import lowrank  # noqa: E402
from checkpoint_models import gpt2, llama  # noqa: E402
from expert_models import adapted, mixture  # noqa: E402
from lowrank import LoraConfig  # noqa: E402
from lowrank.adapters.convert import convert_adapter  # noqa: E402
from lowrank.adapters.resize import resize_adapter  # noqa: E402
from lowrank.analysis.inspection import inspect_adapter  # noqa: E402
from lowrank.errors import LowrankError  # noqa: E402

SECONDS, MEMORY = 10, 2**30
PEFT_KINDS = ("fused", "start", "whole", "rows", "experts")
KINDS = (*PEFT_KINDS, "gguf", "mlx", "loralib", "bin")
WRONG: list[Any] = [
    *fuzz.VALUES,
    *fuzz.TEXTS,
    10**400,
    10**299,
    -0.5,
    [None],
    [0, 1, 1, 1],
    [[0, 10**9, 1, 1]],
    ["q", "v"],
]
WRONG += [
    r"((\w|\.)+)+!",
    "(" * 2000,
    {"c_attn": 2},
    {".*": 10**12},
    {r"(.*)*!": 1},
    "all-linear",
    "pissa_niter_" + "9" * 99,
]
EXTREME = [0, 1, 2, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


def _adapted(build: Callable[[], Any], folder: Path, **options: Any) -> None:
    model = build()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lowrank.save_adapter(model, folder)


@functools.cache
def _model(build: Callable[[], Any]) -> Any:
    """One model serves all cases."""
    return build()


def _experts() -> Any:
    return mixture("mixtral")


def make_seeds(folder: Path) -> None:
    """A sound adapter of every kind, and beside it the config.json of its base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _adapted(gpt2, folder / "fused" / "a", target_modules=["c_attn[q,v]"], rank_pattern={"h.1.attn.c_attn": 3})
        _adapted(gpt2, folder / "start" / "a", target_modules=["c_fc"], init_lora_weights="pissa", use_rslora=True)
        _adapted(
            gpt2, folder / "whole" / "a", target_modules=["c_fc", "wte"], modules_to_save=["ln_f"], bias="lora_only"
        )
        _adapted(gpt2, folder / "rows" / "a", target_modules=["c_fc"], trainable_token_indices=[1, 3])
        lowrank.save_adapter(adapted(_experts()), folder / "experts" / "a")
        _adapted(llama, folder / "llama", target_modules=["q_proj", "down_proj"])
        for kind, build in (("gguf", llama), ("mlx", llama), ("loralib", gpt2), ("bin", gpt2)):
            (folder / kind / "base").mkdir(parents=True)
            (folder / kind / "base" / "config.json").write_text(
                json.dumps(build().config.to_dict() | {"architectures": [type(build()).__name__]})
            )
        base = folder / "gguf" / "base"
        convert_adapter(folder / "llama", folder / "gguf" / "a.gguf", to="gguf", model=base)
        convert_adapter(folder / "llama", folder / "mlx" / "a", to="mlx", model=base)
        convert_adapter(folder / "fused" / "a", folder / "loralib" / "a.safetensors", to="loralib")
        convert_adapter(folder / "fused" / "a", folder / "bin" / "a.bin", to="loralib")
        shutil.rmtree(folder / "llama")


def make_case(seeds: Path, folder: Path, number: int, seed: int) -> str:
    """Case `number` of a run in `folder`: a sound adapter with one to three faults. Returns its kind."""
    dice = random.Random(f"{seed}/{number}")
    kind = KINDS[number % len(KINDS)]
    shutil.copytree(seeds / kind, folder)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if files:
            spoil(dice.choice(files), dice)
    return kind


def spoil(path: Path, dice: random.Random) -> None:
    """A fault that fits the kind of file."""
    if path.suffix == ".json":
        dice.choice([_field, _field, _field, fuzz.mutate_json, fuzz.mutate_bytes, fuzz.mutate_files])(path, dice)
    elif path.suffix == ".safetensors":
        dice.choice([fuzz.mutate_tensors, fuzz.mutate_json, fuzz.mutate_bytes, fuzz.mutate_files])(path, dice)
    else:
        dice.choice([mutate_number, mutate_number, fuzz.mutate_bytes])(path, dice)


def _field(path: Path, dice: random.Random) -> None:
    """Another value at any depth of a JSON file."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError):
        return
    at, names = content, list(content) if isinstance(content, dict) else []
    while names:
        name = dice.choice(names)
        inner = at[name]
        deeper = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        if not deeper or dice.random() < 0.4:
            at[name] = dice.choice(WRONG)
            break
        at, names = inner, deeper
    path.write_text(json.dumps(content))


def mutate_number(path: Path, dice: random.Random) -> None:
    """An extreme number somewhere in front, where a binary format has its lengths."""
    content = bytearray(path.read_bytes())
    form = dice.choice(["<I", "<Q"])
    at = dice.randrange(max(min(len(content), dice.choice([24, 400, 2000])) - 8, 1))
    value = dice.choice(EXTREME) % 2 ** (8 * struct.calcsize(form))
    content[at : at + struct.calcsize(form)] = struct.pack(form, value)
    path.write_bytes(content)


def calls(folder: Path, kind: str) -> list[Callable[[], object]]:
    """What every reader of this kind does."""
    out = folder / "out"
    if kind in PEFT_KINDS:
        return [
            lambda: inspect_adapter(folder / "a"),
            lambda: convert_adapter(folder / "a", out / "mlx", to="mlx"),
            lambda: convert_adapter(folder / "a", out / "lora.bin", to="loralib"),
            lambda: resize_adapter(folder / "a", out / "resized", rank=1),
        ]
    source = {"gguf": "a.gguf", "mlx": "a", "loralib": "a.safetensors", "bin": "a.bin"}[kind]
    options: dict[str, Any] = {"model": folder / "base"} if kind == "gguf" else {}
    options |= {"alpha": 5.0, "allow_pickle": True} if kind in ("loralib", "bin") else {}
    return [lambda: convert_adapter(folder / source, out / "peft", **options)]


def broken_promise(folder: Path, kind: str) -> str | None:
    """Read the case in `folder` in every way; what is wrong with how that went, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for call in calls(folder, kind):
                try:
                    call()
                except LowrankError as error:
                    if len(str(error)) > running.LONGEST_MESSAGE:
                        return f"a message of {len(str(error))} characters"
            return _left(folder, _experts if kind == "experts" else gpt2) if kind in PEFT_KINDS else None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)


def _left(folder: Path, build: Callable[[], Any]) -> str | None:
    """Load the adapter; a model that refused it, or gave it back, must be plain."""
    model = _model(build)
    keys = list(model.state_dict())
    try:
        try:
            lowrank.load_adapter(model, folder / "a")
        except LowrankError:
            pass
        else:
            with torch.no_grad():
                model(input_ids=torch.arange(5)[None])
            lowrank.unload(model)
        left = lowrank.adapter_configs(model) or list(model.state_dict()) != keys
    except BaseException:
        _model.cache_clear()
        raise
    if left:
        _model.cache_clear()
        return "the adapter is left in the model"
    return None


@contextmanager
def bounded(seconds: int = SECONDS, memory: int | None = MEMORY) -> Iterator[None]:
    """Ten seconds of work, a minute by the clock where it waits, and a gigabyte more than the process has."""
    usual = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, _hangs)
    signal.signal(signal.SIGPROF, _hangs)
    if memory is not None and Path("/proc/self/statm").exists():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, usual[1]))
    signal.alarm(6 * seconds)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, usual)


class Hangs(BaseException):
    """No error of a reader's, which one that is given to it would catch."""


def _hangs(_signal: int, _frame: object) -> None:
    raise Hangs(f"it takes more than {SECONDS} s")


def main() -> int:
    """Run the cases; the number of kept ones is the exit status, at most 100."""
    asked = running.options(__doc__)
    with tempfile.TemporaryDirectory(dir=running.MEMORY_DISK) as name:
        make_seeds(seeds := Path(name) / "seeds")

        def case(place: Path, number: int) -> tuple[str | None, running.Keep]:
            folder = place / "case"
            kind = make_case(seeds, folder, number, asked.seed)
            with bounded():
                fault = broken_promise(folder, kind)
            return fault, lambda where: _keep(folder, where, kind, fault or "")

        return running.search(asked, case)


def _keep(folder: Path, where: Path, kind: str, fault: str) -> Path:
    target = running.kept(folder, where, "reader")
    (target / "kind.txt").write_text(f"{kind}\n{fault.strip().splitlines()[-1]}\n".replace(str(folder), ""))
    return target


if __name__ == "__main__":
    sys.exit(main())
