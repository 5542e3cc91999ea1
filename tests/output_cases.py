"""Every command that writes, as a line to be called in a folder with its inputs; the place of the result comes last."""

from pathlib import Path

import torch

import lowrank
from lowrank import LoraConfig
from lowrank.train.models import load_causal
from train_models import completion_rows, save_llama, write_jsonl

SHORT = "--steps 1 --batch-size 4 --device cpu"
FOLDERS = {
    "train": f"train --model base --data rows.jsonl --eval-data unseen.jsonl {SHORT} --out",
    "train --full": f"train --full --model base --data rows.jsonl {SHORT} --out",
    "dimension": f"dimension --model base --data rows.jsonl {SHORT} --ladder 4 --seeds 1 --out",
    "merge": "merge --model base --adapter adapter --adapter other --out",
    "combine": "combine --adapter adapter --adapter other --out",
    "extract": "extract --model base --tuned tuned --rank 2 --out",
    "resize": "resize --adapter adapter --rank 1 --out",
    "convert to peft": "convert --source adapter --to peft --out",
    "convert to peft-bin": "convert --source adapter --to peft-bin --out",
    "convert to mlx": "convert --source adapter --to mlx --out",
    "convert to safetensors": "convert --source pickled --to safetensors --allow-pickle --out",
}
FILES = {
    "convert to gguf": "convert --source adapter --to gguf --model base --out",
    "convert to loralib": "convert --source adapter --to loralib --out",
    "inspect": "inspect adapter --model base --against other --html",
    "rank": "rank --adapter adapter --out",
    "plot": "plot run/log.jsonl --out",
    "data show": "data show --model base --data rows.jsonl --html",
}
COMMANDS = FOLDERS | FILES
ENDINGS = {
    "convert to gguf": ".gguf",
    "convert to loralib": ".safetensors",
    "plot": ".svg",
}  # which their results must have


def make_inputs(home: Path) -> None:
    """All that the lines of COMMANDS name."""
    save_llama(home / "base")
    save_llama(home / "tuned", seed=1)
    write_jsonl(home / "rows.jsonl", completion_rows(24))
    write_jsonl(home / "unseen.jsonl", completion_rows(4, seed=1))
    for seed, name in enumerate(("adapter", "other")):
        model = load_causal(home / "base", torch.float32)
        lowrank.inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
        torch.manual_seed(seed)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".lora_" in path:
                    parameter.normal_(std=0.3)
        lowrank.save_adapter(model, home / name)
    (home / "run").mkdir()
    (home / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (home / "pickled").mkdir()
    torch.save(load_causal(home / "base", torch.float32).state_dict(), home / "pickled" / "pytorch_model.bin")
    (home / "pickled" / "config.json").write_bytes((home / "base" / "config.json").read_bytes())


def inputs_of(line: str, home: Path) -> list[Path]:
    """The inputs that a line names."""
    return [home / word for word in line.split() if (home / word).exists()]


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """{path: bytes of a file, target of a link, None of a folder} of everything in a folder, hidden or not."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }
