"""Which rows of a fused projection are its query, key and value, read from the model's config, never guessed.

Each layout is a function from the config to {part: rows}; a table says which layout which architecture uses.
"""

from collections.abc import Callable
from typing import Any

from lowrank.core.rows import RowBlock
from lowrank.errors import TargetError

Layout = Callable[[Any], dict[str, RowBlock]]


def stacked(**widths: int) -> dict[str, RowBlock]:
    """Parts one after another: q rows, then k rows, then v rows."""
    parts, start = {}, 0
    for name, width in widths.items():
        parts[name] = RowBlock(start, width)
        start += width
    return parts


def repeated(groups: int, **widths: int) -> dict[str, RowBlock]:
    """Parts repeated for every head or group of heads: (q, k, v), (q, k, v), ..."""
    stride = sum(widths.values())
    return {name: RowBlock(block.start, block.width, stride, groups) for name, block in stacked(**widths).items()}


def _hidden_and_heads(config: Any) -> tuple[int, int]:
    return config.hidden_size, config.num_attention_heads


def equal_thirds(config: Any) -> dict[str, RowBlock]:
    """GPT-2, MPT, ModernBERT: q, k and v of the hidden width each."""
    hidden, _ = _hidden_and_heads(config)
    return stacked(q=hidden, k=hidden, v=hidden)


def per_head(config: Any) -> dict[str, RowBlock]:
    """BLOOM, GPT-NeoX, Persimmon, DeBERTa: every head holds its own q, k, v."""
    hidden, heads = _hidden_and_heads(config)
    return repeated(heads, q=hidden // heads, k=hidden // heads, v=hidden // heads)


def grouped_query(config: Any) -> dict[str, RowBlock]:
    """Phi-3: all query heads, then the fewer key and value heads."""
    hidden, heads = _hidden_and_heads(config)
    head = getattr(config, "head_dim", None) or hidden // heads
    few = getattr(config, "num_key_value_heads", None) or heads
    return stacked(q=heads * head, k=few * head, v=few * head)


def dbrx(config: Any) -> dict[str, RowBlock]:
    """DBRX: as Phi-3, with the number of key and value heads in a config of its own."""
    head = config.d_model // config.n_heads
    few = config.attn_config.kv_n_heads
    return stacked(q=config.d_model, k=few * head, v=few * head)


def latent(config: Any) -> dict[str, RowBlock]:
    """DeepSeek's keys and values from one latent vector: every head holds the unrotated part of its key, then v."""
    return repeated(config.num_attention_heads, k=config.qk_nope_head_dim, v=config.v_head_dim)


def gate_up(config: Any) -> dict[str, RowBlock]:
    """Phi-3's MLP: gate, then up."""
    return stacked(gate=config.intermediate_size, up=config.intermediate_size)


def falcon(config: Any) -> dict[str, RowBlock]:
    """Falcon's three layouts: groups of query heads sharing k and v; one k and v for all; every head its own."""
    hidden, heads = _hidden_and_heads(config)
    head = hidden // heads
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        return repeated(groups, q=heads // groups * head, k=head, v=head)
    if config.multi_query:
        return stacked(q=hidden, k=head, v=head)
    return per_head(config)


def gpt_bigcode(config: Any) -> dict[str, RowBlock]:
    """StarCoder: one k and v head for all queries, or every head its own."""
    hidden, heads = _hidden_and_heads(config)
    return stacked(q=hidden, k=hidden // heads, v=hidden // heads) if config.multi_query else per_head(config)


def codegen(config: Any) -> dict[str, RowBlock]:
    """CodeGen: four shards, each with q, v, k in this order."""
    quarter = config.hidden_size // 4
    return repeated(4, q=quarter, v=quarter, k=quarter)


LAYOUTS: dict[tuple[str, str], Layout] = {
    **{(model, "c_attn"): equal_thirds for model in ("gpt2", "imagegpt", "decision_transformer", "openai-gpt")},
    ("gpt_bigcode", "c_attn"): gpt_bigcode,
    **{(model, "query_key_value"): per_head for model in ("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon")},
    ("falcon", "query_key_value"): falcon,
    ("phi3", "qkv_proj"): grouped_query,
    ("phi3", "gate_up_proj"): gate_up,
    ("codegen", "qkv_proj"): codegen,
    ("deberta", "in_proj"): per_head,
    **{(model, "kv_b_proj"): latent for model in ("deepseek_v2", "deepseek_v3")},
    ("mpt", "Wqkv"): equal_thirds,
    ("dbrx", "Wqkv"): dbrx,
    ("modernbert", "Wqkv"): equal_thirds,
}


def equal_thirds_of(out_features: int) -> Layout:
    """nn.MultiheadAttention: q, k and v, a third of the rows each, whatever the model."""
    return lambda _: stacked(**dict.fromkeys("qkv", out_features // 3))


def gate_and_up_of(out_features: int, interleaved: bool) -> Layout:
    """A stack of experts that holds a gate and an up projection: one after the other, or a row of each in turn."""
    half = out_features // 2
    return lambda _: repeated(half, gate=1, up=1) if interleaved else stacked(gate=half, up=half)


def part_rows(
    path: str, out_features: int, names: tuple[str, ...], config: Any, layout: Layout | None = None
) -> tuple[RowBlock, ...]:
    """The rows of the named parts of the fused projection at `path`; layout: its own, looked up where not given.

    Raises TargetError where the architecture's layout is not known, a part does not exist, or the config's widths do
    not add up to the weight's `out_features` rows.
    """
    model_type = getattr(config, "model_type", None)
    leaf = path.rpartition(".")[2]
    layout = layout or LAYOUTS.get((str(model_type), leaf))
    wish = f"{leaf}[{','.join(names)}]"
    if layout is None:
        known = ", ".join(sorted({f"{name} of {model}" for model, name in LAYOUTS}))
        raise TargetError(
            f"{wish}: which rows of {path} belong to each part cannot be known for a model of type {model_type!r}; "
            f"adapt the whole module by {leaf!r}, or use one of the known layouts ({known})"
        )
    parts = layout(config)
    if unknown := [name for name in names if name not in parts]:
        raise TargetError(f"{wish}: {path} has no part {', '.join(unknown)}; its parts are {', '.join(parts)}")
    if len(set(names)) != len(names):
        raise TargetError(f"{wish}: a part is named twice")
    if (total := sum(part.size for part in parts.values())) != out_features:
        raise TargetError(
            f"{wish}: the config's widths add up to {total} rows but {path} has {out_features}, so its parts cannot be "
            f"known; adapt the whole module by {leaf!r}"
        )
    return tuple(parts[name] for name in names)
