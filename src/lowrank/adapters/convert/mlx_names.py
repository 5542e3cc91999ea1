"""What mlx-lm calls the modules of a transformers model.

Its models have modules of their own, mostly under transformers' names: read from mlx-lm 0.32.2, the classes and their
`sanitize` in `models/`. A name that is not known here is refused: mlx-lm would refuse it too, or drop it in silence.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from lowrank.errors import CheckpointError, some

SAME = re.compile(
    r"model\.layers\.\d+\.(self_attn\.((q|k|v|o|qkv)_proj|dense)"
    r"|mlp\.((gate|up|down|gate_up)_proj|fc1|fc2|c_fc|c_proj)"
    r"|mlp\.(shared_experts?\.(gate|up|down)_proj|shared_expert_gate)|block_sparse_moe\.gate)"
    r"|backbone\.(layers\.\d+\.mixer\.(in|x|dt|out)_proj|embeddings)|model\.embed_tokens|lm_head"
)
RENAMED = (  # names that only one family has
    (re.compile(r"gpt_neox\.layers\.(\d+\..+)"), r"model.h.\1"),
    (re.compile(r"gpt_neox\.embed_in"), "model.embed_in"),
    (re.compile(r"embed_out"), "model.embed_out"),
    (re.compile(r"transformer\.(h\.\d+\.(?:attn\.(?:q|k|v|out)_proj|mlp\.fc_(?:in|out)))"), r"model.\1"),  # GPT-J
)
SHARED = re.compile(r"transformer\.(h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)|wte|wpe)")
STEMS = {"GPT2LMHeadModel": "model", "GPTJForCausalLM": "model", "GPTBigCodeForCausalLM": "transformer"}
BACK = (
    (re.compile(r"model\.h\.(\d+\.(?:attention\.|mlp\.dense_).+)"), r"gpt_neox.layers.\1"),
    (re.compile(r"model\.embed_in"), "gpt_neox.embed_in"),
    (re.compile(r"model\.embed_out"), "embed_out"),
    (re.compile(r"model\.(h\.\d+\..+|wte|wpe)"), r"transformer.\1"),
)
EXPERT = re.compile(
    r"(model\.layers\.\d+\.(?:block_sparse_moe|mlp))\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)"
)
EXPERT_ROLES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
TABLES = ("embed_tokens", "wte", "embed_in", "embeddings")


def mlx_names(paths: Collection[str], architecture: str | None) -> dict[str, tuple[str, int | None]]:
    """{path: (mlx-lm's name, the number of an expert)}; the experts of a layer are one module there.

    architecture: of the base, where it is known. Raises CheckpointError for names that mlx-lm does not have, and for
    those of which only the architecture tells what it calls them.
    """
    if any(path.startswith("gpt_neox.") for path in paths):
        architecture = "GPTNeoXForCausalLM"
    found = {path: _name(path, architecture) for path in paths}
    known = {path: name for path, name in found.items() if name is not None}
    if len(known) == len(found):
        return known
    unknown = [path for path, name in found.items() if name is None]
    if architecture not in STEMS and any(SHARED.fullmatch(path) for path in unknown):
        raise CheckpointError(
            f"{some(unknown, 1)}: only the architecture tells what mlx-lm calls it: give the base, --model"
        )
    raise CheckpointError(f"mlx-lm has no name for {some(unknown)} that is known here: leave them out")


def _name(path: str, architecture: str | None) -> tuple[str, int | None] | None:
    if match := EXPERT.fullmatch(path):
        role = EXPERT_ROLES.get(match[3], match[3])
        return f"{match[1]}.switch_mlp.{role}", int(match[2])
    if path == "lm_head" and architecture == "GPTNeoXForCausalLM":
        return "model.embed_out", None
    for pattern, replacement in RENAMED:
        if match := pattern.fullmatch(path):
            return match.expand(replacement), None
    if match := SHARED.fullmatch(path):
        return (f"{STEMS[architecture]}.{match[1]}", None) if architecture in STEMS else None
    return (path, None) if SAME.fullmatch(path) else None


def path_of(name: str) -> str:
    """transformers' path of the module that mlx-lm calls `name`."""
    for pattern, replacement in BACK:
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return name


def check_tie(paths: Collection[str], architecture: str | None, config: Mapping[str, Any]) -> str | None:
    """A note where it cannot be known whether a table is the output head as well.

    Raises CheckpointError where it is: mlx-lm has no head beside a tied table, and a change of the table changes both.
    """
    tables = [path for path in paths if path.rpartition(".")[2] in TABLES]
    if config.get("tie_word_embeddings", architecture == "GPT2LMHeadModel"):
        tied = [path for path in paths if path in ("lm_head", "embed_out")] + tables
        if tied:
            raise CheckpointError(
                f"{tied[0]} is adapted, and in mlx-lm a tied embedding and head are one: leave it out, or merge it"
            )
        return None
    if not tables or "tie_word_embeddings" in config or "lm_head" in paths:
        return None
    return f"{tables[0]} is adapted: mlx-lm computes the same only where the base's output head is not tied to it"
