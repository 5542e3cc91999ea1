"""A fuzz target for the byte formats: GGUF, safetensors, JSON, pickles; as of PEFT, mlx-lm, loralib, kohya.

Bytes go straight to the function that reads them, without an adapter around: thousands of cases a second. Coverage
leads the way where atheris is installed (`pip install 'lowrank[fuzz]'`); elsewhere the target gets our own mutations.

    python tests/hostile/byte_formats.py --minutes 10 [--seed 0] [--keep tests/hostile] [--cases N]

Every case answers or raises what its reader promises, in 10 seconds and a gigabyte. The first byte of a case is the
number of its format, so a kept file `bytes-HASH` is read again by `test_hostile_readers.py` alone.
"""

import argparse
import atexit
import hashlib
import importlib
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

READERS = ["adapters.convert.gguf_file", "adapters.convert.loralib", "adapters.convert.mlx", "checkpoint.companion"]
READERS += ["checkpoint.config_file", "checkpoint.read", "files.json_file", "files.regular", "files.safetensors"]
READERS += ["injection.patterns", "injection.regex"]

try:
    import atheris
except ImportError:
    atheris = None
else:
    with atheris.instrument_imports(include=["lowrank"]):  # what is imported here first is watched
        for module in READERS:
            importlib.import_module(f"lowrank.{module}")

import readers  # noqa: E402
import running  # noqa: E402
import torch  # noqa: E402
from fuzz import mutate_bytes  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from lowrank.adapters.convert import loralib, mlx  # noqa: E402
from lowrank.adapters.convert.gguf_file import read_gguf  # noqa: E402
from lowrank.adapters.convert.options import ConvertOptions  # noqa: E402
from lowrank.checkpoint.companion import NAME as COMPANION  # noqa: E402
from lowrank.checkpoint.companion import read_companion  # noqa: E402
from lowrank.checkpoint.config_file import NAME as CONFIG  # noqa: E402
from lowrank.checkpoint.config_file import read_config  # noqa: E402
from lowrank.checkpoint.read import read_pickle, read_safetensors  # noqa: E402
from lowrank.errors import LowrankError  # noqa: E402
from lowrank.injection.patterns import matches  # noqa: E402

SCRATCH = Path(tempfile.mkdtemp(prefix="lowrank-fuzz-", dir=running.MEMORY_DISK))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
EXPRESSIONS = (rb".*\.q_proj", rb"(model|h)\.\d+\.(?:a|b[c-f]){1,3}$", rb"((\w|\.)+)+!")
NAMES = ("model.layers.0.self_attn.q_proj", "h.1.attn.c_attn", "a" * 200)


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    path = SCRATCH / name

    def case(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return case


LORALIB = ConvertOptions(None, 5.0, (True, False, True), None, True)


def _mlx(name: str) -> Callable[[bytes], object]:
    """One of the two files of mlx-lm's is the case; the other is sound."""
    folder = SCRATCH / f"mlx-{name}"

    def case(data: bytes) -> object:
        if not folder.exists():
            shutil.copytree(_seeds() / "mlx" / "a", folder)
        (folder / name).write_bytes(data)
        return mlx.read_mlx(folder, LORALIB)

    return case


def _expression(data: bytes) -> None:
    for name in NAMES:
        matches(name, data.decode("utf-8", "replace"), "rank_pattern")


FORMATS: dict[str, Callable[[bytes], object]] = {
    "gguf": _file("a.gguf", read_gguf),
    "safetensors": _file("a.safetensors", read_safetensors),
    "config": _file(CONFIG, lambda path: read_config(path.parent)),
    "companion": _file(COMPANION, lambda path: read_companion(path.parent)),
    "pickle": _file("a.bin", read_pickle),
    "expression": _expression,
    "mlx": _mlx(mlx.WEIGHTS),
    "mlx config": _mlx(CONFIG),
    "loralib": _file("l.safetensors", lambda path: loralib.read_loralib(path, LORALIB)),
    "loralib pickle": _file("l.bin", lambda path: loralib.read_loralib(path, LORALIB)),
}
ORDER = tuple(FORMATS.values())


def one_case(data: bytes) -> None:
    """Read the case; whatever leaves this function but LowrankError is a finding."""
    if data:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ORDER[data[0] % len(ORDER)](data[1:])
        except LowrankError as error:
            assert len(str(error)) <= running.LONGEST_MESSAGE, "a long message"


def broken_promise(data: bytes) -> str | None:
    """What is wrong with how the case went, within its bounds, or None."""
    try:
        with readers.bounded():
            one_case(data)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    return None


def _seeds() -> Path:
    """Sound files of every format, beside them one of kohya's, whose names are refused."""
    folder = SCRATCH / "seeds"
    if not folder.exists():
        readers.make_seeds(folder)
        name = "lora_unet_down_blocks_0_attn1_to_q"
        factors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
        (folder / "kohya").mkdir()
        save_file(factors | {f"{name}.alpha": torch.tensor(2.0)}, folder / "kohya" / "k.safetensors")
    return folder


def _formats(path: Path) -> list[str]:
    """Whose readers get a sound file."""
    kind, suffix = path.relative_to(_seeds()).parts[0], path.suffix
    if path.name in (CONFIG, COMPANION):
        return {"mlx": ["mlx config"]}.get(kind, ["config" if path.name == CONFIG else "companion"])
    if suffix == ".safetensors":
        return ["safetensors", *{"mlx": ["mlx"], "loralib": ["loralib"], "kohya": ["loralib"]}.get(kind, [])]
    return {".gguf": ["gguf"], ".bin": ["pickle", "loralib pickle"]}.get(suffix, [])


def make_corpus() -> list[bytes]:
    """Sound files of every format, small, each behind the number of its format."""
    number = {name: bytes([at]) for at, name in enumerate(FORMATS)}
    files = [path for path in sorted(_seeds().rglob("*")) if path.is_file()]
    found = [number[name] + path.read_bytes() for path in files for name in _formats(path)]
    return found + [number["expression"] + text for text in EXPRESSIONS]


def fuzz_blind(asked: argparse.Namespace) -> int:
    """Our own mutations of the corpus; how many findings there were, at most 100."""
    dice, corpus = random.Random(asked.seed), make_corpus()

    def case(folder: Path, _number: int) -> tuple[str | None, running.Keep]:
        (file := folder / "case").write_bytes((sound := dice.choice(corpus))[1:])
        for _ in range(dice.choice([1, 1, 2, 4])):
            dice.choice([mutate_bytes, readers.mutate_number])(file, dice)
        data = sound[:1] + file.read_bytes()
        return broken_promise(data), lambda where: _keep(data, where)

    return running.search(asked, case)


def _keep(data: bytes, where: Path) -> Path:
    target = where / f"bytes-{hashlib.sha256(data).hexdigest()[:12]}"
    target.write_bytes(data)
    return target


def fuzz_led(minutes: float, cases: int, seed: int, keep: Path) -> None:
    """By coverage, in libFuzzer, which ends the process: status 77 where something was found (`bytes-HASH`)."""
    corpus = SCRATCH / "corpus"
    corpus.mkdir()
    for number, data in enumerate(make_corpus()):
        (corpus / str(number)).write_bytes(data)
    options = [f"-max_total_time={int(60 * minutes)}", f"-runs={cases}", f"-seed={seed + 1}", "-max_len=20000"]
    options += [f"-timeout={readers.SECONDS}", "-malloc_limit_mb=1024", "-rss_limit_mb=3000"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={keep}/bytes-", str(corpus)], one_case)
    atheris.Fuzz()


def main() -> int:
    """Run for a while; the exit status is not 0 where something was found."""
    asked = running.options(__doc__)
    if atheris is None:
        print("atheris is not installed (the extra `fuzz`): mutations of our own, not led by coverage", file=sys.stderr)
        return fuzz_blind(asked)
    fuzz_led(asked.minutes, asked.cases, asked.seed, asked.keep)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
