"""The card of a merged model: what was merged from what, with hashes, in the README.md that model pages show.

Nothing in it tells a path of this machine or the time: the same merge writes the same card.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from lowrank.checkpoint import config_file
from lowrank.checkpoint.read import PICKLE, SAFETENSORS
from lowrank.merge.disk.adapters import Adapter
from lowrank.merge.disk.plan import MergePlan
from lowrank.merge.disk.verify import Findings
from lowrank.modelfiles.base import BaseFiles

ADAPTER_FILES = (config_file.NAME, SAFETENSORS, PICKLE)
READ_AT_ONCE = 2**20


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def card(
    base: BaseFiles, adapters: Iterable[Adapter], plan: MergePlan, findings: Findings, hashes: Mapping[str, str]
) -> bytes:
    """README.md. hashes: {file of the result: SHA-256} where they were computed (`--verify full`)."""
    adapters = list(adapters)
    merged = [recipe for recipe in plan.recipes if recipe.contributions]
    lines = [
        *_front_matter(adapters),
        "# Merged model",
        "",
        f"`{base.label}` with {_listed(adapters)} merged into it by lowrank: W = W0 + Σ weight·s·B·A, summed in "
        "float32 or wider and rounded once.",
        "",
        f"- {len(merged)} of {len(plan.recipes)} tensors changed by low-rank factors, "
        f"{sum(recipe.replacement is not None for recipe in plan.recipes)} replaced by the adapter's own copy",
        f"- verified: {findings.rows} merged rows recomputed in float64, each within one rounding",
        *_survival(findings),
        *(f"- {note}" for note in (*(f"names exchanged, {text}" for text in plan.renamed), *plan.notes)),
        "",
        "| file | SHA-256 |",
        "|---|---|",
        *_hash_rows(base, adapters),
        *(f"| result: {name} | {value} |" for name, value in hashes.items()),
    ]
    return ("\n".join(lines) + "\n").encode(errors="replace")


def _front_matter(adapters: list[Adapter]) -> list[str]:
    """What model pages read; the base's public name, where an adapter's config tells one that is no local path."""
    named = {str(adapter.files.config.raw.get("base_model_name_or_path") or "") for adapter in adapters}
    public = sorted(name for name in named if name.count("/") == 1 and not name.startswith((".", "/", "~")))
    lines = [f"base_model: {json.dumps(public[0])}"] if len(public) == 1 else []
    return ["---", *lines, "tags:", "- merge", "- lora", "- lowrank", "---", ""]


def _listed(adapters: list[Adapter]) -> str:
    return ", ".join(f"`{a.label}`" + (f" (weight {a.weight:g})" if a.weight != 1 else "") for a in adapters)


def _survival(findings: Findings) -> list[str]:
    if not findings.surviving:
        return []
    least = min(findings.surviving, key=lambda name: findings.surviving[name])
    return [f"- at least {findings.surviving[least]:.1%} of every ‖ΔW‖² is left after rounding (least: `{least}`)"]


def _hash_rows(base: BaseFiles, adapters: list[Adapter]) -> list[str]:
    rows = []
    if (base.folder / "config.json").is_file():
        rows.append(f"| base: config.json | {sha256_of(base.folder / 'config.json')} |")
    for shard in base.shards:
        digest = hashlib.sha256(shard.layout.header).hexdigest()
        rows.append(f"| base: header of {shard.name} ({shard.layout.size} bytes) | {digest} |")
    for adapter in adapters:
        for name in ADAPTER_FILES:
            if (adapter.folder / name).is_file():
                rows.append(f"| {adapter.label}: {name} | {sha256_of(adapter.folder / name)} |")
    return rows
