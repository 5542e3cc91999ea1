"""The card of a trained adapter: what it was made of, how, and how good it got, in the README.md that pages show.

The same run writes the same card. What others named (models, files, labels) stands in code, where it is only text, and
no path is told but what the user typed; the run's own folder is not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowrank.data.rows import JUDGES, PER_TOKEN
from lowrank.errors import printable
from lowrank.train.settings import TrainSettings
from lowrank.train.views.spark import spark

NAME = "README.md"
ELSEWHERE = (
    "out",
    "stop_after",
    "save_every",
    "keep_checkpoints",
    "cache",
    "log_every",
    "log_to",
    "shard",
    "sample_prompts",
    "sample_tokens",
)  # which change no weight


def card(
    settings: TrainSettings, record: Mapping[str, Any], made_of: Mapping[str, str], losses: Sequence[float]
) -> bytes:
    """record: what run.json says; made_of: hashes by what they are of; losses: as they were reported, in order."""
    kind = record["recipe"]["kind"]
    lines = [
        *_front_matter(settings.model),
        f"# A LoRA adapter of {code(settings.model)}",
        "",
        f"Trained by `lowrank train` on {code(settings.data)} ({kind}): {record['steps']:,} steps, "
        f"{record['trained_tokens']:,} trained {'tokens' if kind in PER_TOKEN else 'rows'}.",
        "",
        *_loading(settings.model, kind in JUDGES),
        *_scores(record["evaluations"], record["best_step"]),
        *([f"Training loss, first to last: {spark(losses)} {losses[0]:.4g} to {losses[-1]:.4g}", ""] if losses else []),
        "## What it was made of",
        "",
        "| of | hash |",
        "|---|---|",
        *(f"| {_cell(what)} | {_cell(value)} |" for what, value in sorted(made_of.items())),
        *(f"| {name} | {_cell(str(value))} |" for name, value in record["versions"].items()),
        "",
        "## Settings",
        "",
        *_settings(settings),
    ]
    return ("\n".join(lines) + "\n").encode(errors="replace")


def _front_matter(model: str) -> list[str]:
    """What model pages read: the base's public name, where what was typed is one."""
    name = model.partition("@")[0]
    public = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    base = [f"base_model: {json.dumps(name)}"] if public else []
    return ["---", *base, "library_name: peft", "tags:", "- lora", "- lowrank", "---", ""]


def _loading(model: str, judges: bool) -> list[str]:
    """How it is used, in a block that nothing in the name can leave. judges: it gives labels or a number."""
    base, kind = json.dumps(printable(model)), "SequenceClassification" if judges else "CausalLM"
    return fenced(
        "python",
        [
            "import lowrank",
            f"from transformers import AutoModelFor{kind}",
            "",
            f"model = AutoModelFor{kind}.from_pretrained({base})",
            'lowrank.load_adapter(model, "path/of/this/folder")  # or peft.PeftModel.from_pretrained(model, ...)',
        ],
    )


def _scores(evaluations: Sequence[Mapping[str, Any]], best: int | None) -> Iterator[str]:
    if not evaluations:
        return
    names = [name for name in evaluations[0] if name not in ("step", "tokens")]
    yield from ("## Scores", "")
    yield f"Step 0 is before training; the lowest loss was at step {best}."
    yield ""
    yield f"| step | {' | '.join(name.replace('_', ' ') for name in names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for found in evaluations:
        yield f"| {found['step']} | {' | '.join(f'{found[name]:.4f}' for name in names)} |"
    yield ""


def _settings(settings: TrainSettings) -> list[str]:
    import yaml

    told = {name: value for name, value in settings.resolved().items() if name not in ELSEWHERE}
    return fenced("yaml", yaml.safe_dump(told, sort_keys=False, allow_unicode=True).splitlines())


def fenced(language: str, lines: Sequence[str]) -> list[str]:
    """A block of code whose fence is longer than any in it."""
    ticks = "`" * max(3, 1 + max((_ticks(line) for line in lines), default=0))
    return [f"{ticks}{language}", *(printable(line, "\t") for line in lines), ticks, ""]


def code(text: str) -> str:
    """Text within a line, in code."""
    shown = printable(text)
    ticks = "`" * (1 + _ticks(shown))
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def _cell(text: str) -> str:
    return code(text).replace("|", "\\|")


def _ticks(text: str) -> int:
    """The longest run of ` in it."""
    most = run = 0
    for sign in text:
        run = run + 1 if sign == "`" else 0
        most = max(most, run)
    return most
