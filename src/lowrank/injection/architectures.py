"""The query and value projections of the common architectures: what is adapted when nothing is asked for."""

from collections.abc import Collection

Names = tuple[str, ...]

SPLIT: Names = ("q_proj", "v_proj")
BERT: Names = ("query", "value")

# The names of the projections, and the model types (of transformers' configs) that use them. Where several names are
# given, releases of transformers or settings of the model differ, and the first that the model has are meant.
_FAMILIES: tuple[tuple[tuple[Names, ...], str], ...] = (
    (
        (SPLIT,),
        "llama llama4 llama4_text mistral mistral3 ministral ministral3 mixtral phi phimoe qwen2 qwen2_moe qwen3 "
        "qwen3_moe gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text vaultgemma olmo olmo2 olmo3 olmoe granite "
        "granitemoe starcoder2 stablelm cohere cohere2 smollm3 glm glm4 glm4_moe nemotron gpt_oss helium exaone4 "
        "seed_oss ernie4_5 ernie4_5_moe arcee apertus cwm opt gptj gpt_neo biogpt xglm modernbert-decoder eurobert",
    ),
    ((SPLIT,), "bart mbart pegasus marian m2m_100 nllb-moe blenderbot blenderbot-small plbart t5gemma"),
    ((SPLIT,), "whisper wav2vec2 hubert wavlm unispeech data2vec-audio speech_to_text qwen2_audio"),
    ((SPLIT,), "clip clip_text_model clip_vision_model siglip siglip_vision_model siglip2 pixtral"),
    ((SPLIT,), "qwen2_vl qwen2_5_vl qwen3_vl llava llava_next paligemma idefics3 smolvlm internvl mllama aria"),
    (
        (BERT,),
        "bert roberta xlm-roberta xlm-roberta-xl roberta-prelayernorm electra camembert ernie layoutlm layoutlmv3 "
        "albert megatron-bert rembert big_bird nystromformer mobilebert roformer splinter xmod data2vec-text",
    ),
    ((SPLIT, BERT), "vit deit vit_mae vit_msn ijepa dinov2 dinov2_with_registers beit videomae nomic_bert"),
    ((("query_proj", "value_proj"),), "deberta-v2"),
    ((("in_proj[q,v]",),), "deberta"),
    ((("linear_q", "linear_v"),), "wav2vec2-bert"),
    ((("q_lin", "v_lin"),), "distilbert flaubert xlm"),
    ((("q", "v"),), "mpnet t5 mt5 umt5 longt5 switch_transformers"),
    ((("c_attn[q,v]",),), "gpt2 imagegpt decision_transformer openai-gpt gpt_bigcode"),
    ((("query_key_value[q,v]",),), "gpt_neox gpt_neox_japanese bloom falcon persimmon"),
    ((("qkv_proj[q,v]",),), "phi3 codegen"),
    ((("Wqkv[q,v]",),), "mpt dbrx modernbert"),
    ((("q_b_proj", "kv_b_proj[v]"), ("q_proj", "kv_b_proj[v]")), "deepseek_v2 deepseek_v3"),
)

QUERY_VALUE: dict[str, tuple[Names, ...]] = {
    model_type: choices for choices, types in _FAMILIES for model_type in types.split()
}


def query_value(model_type: str, leaves: Collection[str]) -> Names | None:
    """What to adapt in a model of this type, among whose module names (last parts) are `leaves`; None where unknown."""
    choices = QUERY_VALUE.get(model_type)
    if choices is None:
        return None
    return next((names for names in choices if all(name.partition("[")[0] in leaves for name in names)), choices[0])
