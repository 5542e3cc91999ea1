"""A fuzz target for merging on disk: damaged bases and adapters, and the one promise that must hold for all of them.

A merge of any input either succeeds, with a result whose every file is whole, or raises a LowrankError of one sentence,
with nothing under the final name and nothing beside it. Sources stay as they were. It never hangs.

    python tests/hostile/fuzz.py --minutes 10 [--seed 0] [--keep tests/hostile]

What breaks the promise is kept as a folder `case-HASH` (base, adapter, why.txt); `test_merge_disk_hostile.py` merges
all that are kept. The mutations are of bytes, of JSON values, of tensors and of files.
"""

import json
import random
import shutil
import signal
import struct
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

import running

from lowrank.errors import LowrankError
from lowrank.merge.disk import merge_checkpoint
from lowrank.modelfiles.base import read_base

HERE = Path(__file__).resolve().parent
SECONDS = 20  # a merge of some kilobytes that takes longer hangs
VALUES = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1e308, 0.5, float("nan"), [], {}, [[]], [0, 10], {"a": 1}]
TEXTS = ["", "x", "../x", "F32", "BF16", "model.safetensors", "\ud800", "a\nb", "(", ".*", "q_proj[q,v]", "float16"]
NAMES = ["lm_head.weight", "base_model.model.lm_head.weight", "model.layers.q_proj.weight"]
FILES = ["model.safetensors", "x.safetensors", "config.json"]
SWAPS = [("model.", ""), ("0", "1"), ("lora_A", "lora_B"), ("weight", "bias"), ("q_", "k_")]


def make_seed(folder: Path, dice: random.Random) -> None:
    """A base and an adapter that merge: one file or shards, tied or not, with a bias and a full copy now and then."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    dtype = dice.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    tensors = {"model.embed_tokens.weight": torch.randn(8, 4), "model.layers.0.q_proj.weight": torch.randn(4, 4)}
    tensors |= {"model.layers.0.up_proj.weight": torch.randn(6, 4), "model.layers.0.up_proj.bias": torch.randn(6)}
    tensors |= {"model.conv.weight": torch.randn(6, 2, 3), "model.norm.weight": torch.randn(4)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"steps": torch.tensor(3)}
    if dice.random() < 0.5:
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    else:
        _shard(base, tensors)
    config = {"model_type": dice.choice(["llama", "gpt2", "x"]), "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
    config |= {"tie_word_embeddings": dice.random() < 0.5, "dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    _make_adapter(adapter, dice)


def _shard(base: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = list(tensors)
    table = {}
    for number, part in enumerate((names[:3], names[3:])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, base / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def _make_adapter(folder: Path, dice: random.Random) -> None:
    at = dice.choice(["base_model.model.model.", "base_model.model."])
    factors = {f"{at}layers.0.q_proj.lora_A.weight": (2, 4), f"{at}layers.0.q_proj.lora_B.weight": (4, 2)}
    factors |= {f"{at}layers.0.up_proj.lora_A.weight": (2, 4), f"{at}layers.0.up_proj.lora_B.weight": (6, 2)}
    dora = dice.random() < 0.3
    if dora:
        factors |= {f"{at}layers.0.{n}.lora_magnitude_vector": (d,) for n, d in (("q_proj", 4), ("up_proj", 6))}
    else:
        factors |= {f"{at}embed_tokens.lora_embedding_A": (2, 8), f"{at}embed_tokens.lora_embedding_B": (4, 2)}
        factors |= {f"{at}conv.lora_A.weight": (2, 2, 3), f"{at}conv.lora_B.weight": (6, 2, 1)}
    if dice.random() < 0.4:
        factors |= {f"{at}norm.weight": (4,), f"{at}layers.0.up_proj.base_layer.bias": (6,)}
    tensors = {name: torch.randn(shape) for name, shape in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "use_dora": dora}
    config |= {"modules_to_save": ["norm"], "bias": "lora_only", "use_rslora": dice.random() < 0.3}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def mutate_bytes(path: Path, dice: random.Random) -> None:
    """Change, cut or put in some bytes."""
    content = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 1, 2, 8])):
        at = dice.randrange(len(content)) if content else 0
        kind = dice.randrange(4)
        if kind == 0 and content:
            content[at] = dice.randrange(256)
        elif kind == 1:
            del content[at : at + dice.choice([1, 4, 64, 4096])]
        elif kind == 2:
            content[at:at] = dice.randbytes(dice.choice([1, 8, 64]))
        elif content:
            content[at] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def mutate_json(path: Path, dice: random.Random) -> None:
    """Exchange one value, or name, somewhere in a JSON file or in a safetensors header."""
    content = path.read_bytes()
    binary = path.suffix == ".safetensors"
    try:
        length = struct.unpack("<Q", content[:8])[0] if binary else len(content)
        start = 8 if binary else 0
        value = json.loads(content[start : start + length])
    except (struct.error, ValueError, OverflowError, RecursionError):
        return mutate_bytes(path, dice)
    text = json.dumps(mutated(value, dice)).encode()
    if dice.random() < 0.05:
        text = text[:1] + text[1:-1] + b"," + text[1:]  # every name twice
    if binary:
        prefix = struct.pack("<Q", dice.choice([len(text)] * 9 + [2**62]))
        path.write_bytes(prefix + text + content[start + length :])
    else:
        path.write_bytes(text)
    return None


def mutated(value: Any, dice: random.Random) -> Any:
    """The JSON value with another value, or name, at some place in it."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        kind = dice.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {dice.choice(["model.x.weight", "__metadata__", "", key + "x", "r"]): value[key]}
        if kind == 2:
            return {(dice.choice([k + ".y", k[1:], k.upper()]) if k == key else k): v for k, v in value.items()}
        return value | {key: mutated(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        at = dice.randrange(len(value))
        return [*value[:at], mutated(value[at], dice), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and dice.random() < 0.7:
        return value + dice.choice([-8, -4, -1, 1, 2, 4, 8, 1000])
    return dice.choice([*VALUES, *TEXTS, [dice.choice(TEXTS)]])


def mutate_tensors(path: Path, dice: random.Random) -> None:
    """Another value, shape, dtype or name for a tensor, in a file that is well formed."""
    if path.suffix != ".safetensors":
        return mutate_json(path, dice)
    try:
        tensors = load_file(path)
    except Exception:
        return mutate_bytes(path, dice)
    if not tensors:
        return None
    name = dice.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = dice.randrange(7)
    if kind == 0 and tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice([float("nan"), float("inf"), 6e4, 3e38, 1e-40])
    elif kind == 1:
        tensor = tensor.to(dice.choice([torch.int8, torch.float16, torch.float64, torch.bool, torch.float8_e4m3fn]))
    elif kind == 2:
        tensor = tensor.unsqueeze(dice.randrange(tensor.ndim + 1))
    elif kind == 3:
        tensor = torch.cat([tensor.view(-1), tensor.view(-1)])
    elif kind == 4:
        tensor = tensor.view(-1)[:0] if dice.random() < 0.5 else tensor.t().contiguous() if tensor.ndim == 2 else tensor
    elif kind == 5:
        del tensors[name]
        name = name.replace(*dice.choice(SWAPS))
    else:
        tensors[dice.choice(["lm_head.weight", "base_model.model.lm_head.weight", "model.layers.q_proj.weight"])] = (
            tensor
        )
        tensor = tensor.clone()
    tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return None


def mutate_files(path: Path, dice: random.Random) -> None:
    """Lose a file, make it a link or a folder, give it another's content or name."""
    kind = dice.randrange(6)
    others = [other for other in path.parent.iterdir() if other.is_file()]
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.with_name(dice.choice(FILES)).write_bytes(dice.choice(others).read_bytes())
    elif kind == 2:
        content = dice.choice(others).read_bytes()
        path.write_bytes(content)
    elif kind == 3:
        path.unlink()
        path.symlink_to(dice.choice([Path("/etc/passwd"), Path(path.name), Path("nowhere"), Path("..")]))
    elif kind == 4:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(dice.choice([b"", b"{}", b"[]", b"\0" * 16, b"{" * 5000, b"[" * 200_000]))


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    *[mutate_bytes] * 3,
    *[mutate_json] * 5,
    *[mutate_tensors] * 4,
    mutate_files,
]


def make_case(folder: Path, number: int, seed: int) -> None:
    """Case `number` of a run: a seed with one to three mutations."""
    dice = random.Random(f"{seed}/{number}")
    torch.manual_seed(dice.randrange(2**31))
    make_seed(folder, dice)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if files:
            dice.choice(MUTATIONS)(dice.choice(files), dice)


def broken_promise(folder: Path) -> str | None:
    """Merge the case in `folder`; what is wrong with how that went, or None. Leaves nothing but the case."""
    before = running.snapshot(folder)
    out = folder / "out"
    options: dict[str, Any] = {"dtype": None, "verify": "full"} if len(before) % 2 else {"dtype": "bfloat16"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge_checkpoint(folder / "base", [folder / "adapter"], out, threads=1, **options)
        read_base(out)
    except LowrankError as error:
        fault = "an error of several lines: " + str(error) if "\n" in str(error) else None
        if out.exists() or list(folder.glob(".out.*")):
            fault = f"something is left after: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        fault = traceback.format_exc()
    else:
        fault = None
        if list(folder.glob(".out.*")):
            fault = "the working folder is left after a success"
    for left in (out, *folder.glob(".out.*")):
        shutil.rmtree(left, ignore_errors=True)
    if running.snapshot(folder) != before:
        fault = "a source was changed"
    return fault


def _hangs(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"it takes more than {SECONDS} s")


def main() -> int:
    """Run for a while; the number of kept cases is the exit status, at most 100."""
    asked = running.options(__doc__)
    signal.signal(signal.SIGALRM, _hangs)

    def case(folder: Path, number: int) -> tuple[str | None, running.Keep]:
        make_case(folder, number, asked.seed)
        signal.alarm(SECONDS)
        fault = broken_promise(folder)
        signal.alarm(0)
        return fault, lambda where: _keep(folder, where, fault or "")

    return running.search(asked, case)


def _keep(folder: Path, where: Path, fault: str) -> Path:
    target = running.kept(folder, where, "case")
    (target / "why.txt").write_text(fault.strip().splitlines()[-1].replace(str(folder), "") + "\n")
    return target


if __name__ == "__main__":
    sys.exit(main())
