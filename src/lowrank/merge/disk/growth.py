"""A vocabulary that an adapter made longer: tables grow by its rows, and config.json says so."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.core.token_rows import TokenRows
from lowrank.errors import MergeError, some
from lowrank.modelfiles.base import BaseFiles

IN_MEMORY = "load the model, resize_token_embeddings, load the adapter, and use merge_and_unload"


def longer(
    base: BaseFiles, rows: Mapping[str, Sequence[TokenRows]], changed: Mapping[str, object], heads: Mapping[str, str]
) -> dict[str, int]:
    """{tensor: its length in the result} of the tables to which adapters bring rows that the base has not.

    heads: heads that the base stores only as their embeddings, with these.
    Raises MergeError where it cannot be known what the new rows are: some are nobody's, a head or a bias of the
    vocabulary gets none, or another adapter changes the table by factors.
    """
    grown: dict[str, int] = {}
    for name, owned in rows.items():
        held = {row for one in owned for row in one.indices}
        length, wanted = base.tensors[heads.get(name, name)][1].shape[0], max(held) + 1
        if wanted <= length:
            continue
        if wanted - length > sum(row >= length for row in held) or name in changed or name in heads:
            raise MergeError(
                f"{name} has {length:,} rows, and not every new one up to {wanted - 1:,} is an adapter's: {IN_MEMORY}"
            )
        grown[name] = wanted
    if grown:
        _check_alike(base, grown)
    return grown


def _check_alike(base: BaseFiles, grown: Mapping[str, int]) -> None:
    lengths = {base.tensors[name][1].shape[0] for name in grown}
    others = [name for name, (_, entry) in base.tensors.items() if entry.shape[:1] and entry.shape[0] in lengths]
    left = [name for name in others if name not in grown]
    if left or len(set(grown.values())) > 1 or len(lengths) > 1:
        raise MergeError(
            f"the adapter adds words to {some(grown)}, and {some(left or grown)} would have another length: train the "
            f"same rows of both (trainable_token_indices by module), or {IN_MEMORY}"
        )
    said = [owner["vocab_size"] for owner in owners(base.config or {}) if "vocab_size" in owner]
    if base.config is not None and not lengths & {size for size in said if isinstance(size, int)}:
        raise MergeError(f"the adapter adds words to {some(grown)}, whose length config.json does not say: {IN_MEMORY}")


def owners(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and its text_config, where it has one."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def with_words(config: dict[str, Any], before: int, now: int) -> dict[str, Any]:
    """The same config, with a vocabulary of `now` words where it says `before`."""
    content = config | ({"vocab_size": now} if config.get("vocab_size") == before else {})
    inner = content.get("text_config")
    return content | {"text_config": with_words(inner, before, now)} if isinstance(inner, dict) else content
