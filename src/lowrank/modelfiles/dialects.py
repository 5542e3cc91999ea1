"""Inner names of layers that transformers 5 changed in its modules but not in its files.

An adapter made with transformers 5 has the names of the modules (`layers.0.attention.q_proj`), a checkpoint keeps those
of the years before (`encoder.layer.0.attention.attention.query`). Each dialect is a list of (pattern, replacement) from
the former to the latter, applied in order to the whole path of a module.
"""

import re
from collections.abc import Iterator

Rule = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_DENSE = (
    (r"\.attention\.o_proj$", ".attention.output.dense"),
    (r"\.mlp\.fc1$", ".intermediate.dense"),
    (r"\.mlp\.fc2$", ".output.dense"),
)
DIALECTS: dict[str, tuple[Rule, ...]] = {
    "ViT, DeiT, BEiT and their kin": _rules(
        (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
        (r"\.attention\.q_proj$", ".attention.attention.query"),
        (r"\.attention\.k_proj$", ".attention.attention.key"),
        (r"\.attention\.v_proj$", ".attention.attention.value"),
        *_DENSE,
    ),
    "Swin": _rules(
        (r"\.attention\.q_proj$", ".attention.self.query"),
        (r"\.attention\.k_proj$", ".attention.self.key"),
        (r"\.attention\.v_proj$", ".attention.self.value"),
        *_DENSE,
    ),
    "GPT-NeoX": _rules((r"^lm_head$", "embed_out")),
}


def translations(paths: list[str]) -> Iterator[list[str]]:
    """The paths in every dialect that knows other names for some of them."""
    for rules in DIALECTS.values():
        translated = paths
        for pattern, replacement in rules:
            translated = [pattern.sub(replacement, path) for path in translated]
        if translated != paths:
            yield translated
