"""What lies beside the weights: config, tokenizer, chat template, licence. Copied, the config corrected at need."""

import json
import os
from collections.abc import Iterable, Iterator
from filecmp import cmp
from pathlib import Path
from typing import Any

from lowrank.checkpoint.adapter_folder import RUN_FILE
from lowrank.files.regular import read_bytes
from lowrank.merge.disk.growth import with_words
from lowrank.modelfiles.base import INDEX_ENDING, OTHER_WEIGHTS, BaseFiles, inside, read_json
from lowrank.modelfiles.tied import untied

TEMPLATE = "chat_template.jinja"
RUN_FILES = (RUN_FILE, "train.yaml", "log.jsonl")  # of the training that made the base, which is not the result's
LEFT_OUT = frozenset({"README.md", "training_args.bin", "adapter_config.json", ".gitattributes", *RUN_FILES})
DTYPE_FIELDS = ("dtype", "torch_dtype")


def side_files(base: BaseFiles) -> Iterator[tuple[str, Path]]:
    """(name in the result, real path) of every file to copy: those beside the weights, and one level below, texts only.

    Weights in other formats, hidden files and the base's card are left out.
    Raises CheckpointError for a link that leads out of the base's folder.
    """
    for entry in sorted(base.folder.iterdir()):
        if entry.name.startswith(".") or entry.name in LEFT_OUT:
            continue
        if entry.is_dir():
            for below in sorted(entry.iterdir()):
                if below.suffix in (".json", ".jinja", ".txt") and below.is_file() and not _is_weights(below.name):
                    yield f"{entry.name}/{below.name}", inside(base.folder, f"{entry.name}/{below.name}")
        elif entry.is_file() and not _is_weights(entry.name):
            yield entry.name, inside(base.folder, entry.name)


def _is_weights(name: str) -> bool:
    return name.endswith((*OTHER_WEIGHTS, ".index.json", INDEX_ENDING))


def own_texts(base: BaseFiles, folder: Path) -> list[str]:
    """The tokenizer and chat template of an adapter's folder, where they are not the base's."""
    names = ("tokenizer.json", TEMPLATE)
    return [
        name
        for name in names
        if (folder / name).is_file()
        and not ((base.folder / name).is_file() and cmp(folder / name, base.folder / name, shallow=False))
    ]


def kept_from_training(base: BaseFiles, folders: Iterable[Path]) -> tuple[dict[str, bytes], list[str]]:
    """({name: content}, notes): what the adapters' trainings say of how rows became tokens, where all say the same.

    run.json, so that `eval` and `generate` ask the merged model as they asked the base with the adapter; and the chat
    template that conversations were written by, so that whoever serves the result writes them alike.
    """
    files = [folder / RUN_FILE for folder in folders]
    recipes = [read_json(file).get("recipe") if file.is_file() else None for file in files]
    kept: dict[str, bytes] = {}
    notes = []
    if any(recipe != recipes[0] for recipe in recipes):
        notes.append(
            "the adapters were trained with different prompts, so the result has no run.json: say --template to eval "
            "and generate"
        )
    elif recipes[0] is not None:
        kept[RUN_FILE] = (json.dumps({"recipe": recipes[0]}, indent=2) + "\n").encode()
    templates = {str(recipe.get("chat_template") or "") if isinstance(recipe, dict) else "" for recipe in recipes}
    template = templates.pop() if len(templates) == 1 else ""
    if templates:
        notes.append("the adapters were trained with different chat templates: the result has the base's, if any")
    elif template and template != (own := own_template(base)):
        kept[TEMPLATE] = template.encode()
        notes.append(
            f"{TEMPLATE} is the chat template that was trained with{'' if own is None else ', not the one of the base'}"
        )
    return kept, notes


def own_template(base: BaseFiles) -> str | None:
    """The chat template that tokenizers read from the base's folder; None where it has none, or several."""
    file, config = base.folder / TEMPLATE, base.folder / "tokenizer_config.json"
    if file.is_file():
        return bytes(read_bytes(file)).decode(errors="replace")
    found = read_json(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None


def corrected_config(
    config: dict[str, Any], dtype: str | None, untie: bool, plain: bool = False, words: tuple[int, int] | None = None
) -> bytes | None:
    """config.json with another dtype, or saying that embedding and head are no longer tied; None if nothing changes.

    plain: the quantised weights became numbers, so that nothing is said of a quantiser any more. words: how many the
    vocabulary had and has.
    """
    changed = untied(config) if untie else config
    changed = changed if words is None else with_words(changed, *words)
    changed = {key: value for key, value in changed.items() if key != "quantization_config"} if plain else changed
    changed = changed if dtype is None else _with_dtype(changed, dtype)
    if changed == config:
        return None
    return (json.dumps(changed, indent=2) + "\n").encode()


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config and those inside it that name a dtype, naming this one."""
    content = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    named = [field for field in DTYPE_FIELDS if field in content]
    if not named and "model_type" in content and not any(isinstance(value, dict) for value in config.values()):
        named = ["dtype"]
    return content | dict.fromkeys(named, dtype)


def write_synced(path: Path, data: bytes) -> None:
    """A small file, on the disk when this returns."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
