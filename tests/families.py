"""A tiny model with random weights of as many transformers families as shrink without being told how."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# By the name of a config's field: what makes a model small. Fields that a config does not have are left out.
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embed_dim": 32,
    "intermediate_size": 48, "d_ff": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_dim": 48, "hidden_dim": 48,
    "n_inner": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "d_kv": 8,
    "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64, "max_source_positions": 64,
    "max_target_positions": 64, "max_sequence_length": 64, "image_size": 16, "patch_size": 8, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "state_size": 8, "time_step_rank": 4,
    "embedding_size": 32, "num_mel_bins": 8, "projection_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 0, "conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "type_vocab_size": 2, "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "use_cache": False,
    "mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "use_mamba_kernels": False,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "num_feat_extract_layers": 2,
    "num_codevectors_per_group": 8, "codevector_dim": 16, "proj_codevector_dim": 16, "classifier_proj_size": 16,
    "tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 16, "squeeze_factor": 2,
    "attention_window": 4, "num_labels": 3, "bottleneck_size": 16, "intra_bottleneck_size": 16, "n_groups": 1,
    "chunk_size": 8, "expand": 2, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    "attention_hidden_size": 32, "moe_num_experts": 4, "mlp_dim": 48, "decoder_hidden_size": 32,
    "decoder_intermediate_size": 48, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
    "lstm_dim": 16, "n_ctx": 64, "rotary_dim": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_types":
    [[["global", "local"], 1]], "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 3, 17, 30, 4, 11, 7], [8, 8, 21, 11, 6, 29, 3, 2]])
WAVE = torch.linspace(-1, 1, 2 * 400).view(2, 400).mul(40).sin()
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).mul(30).sin()
MEL = torch.linspace(-1, 1, 2 * 8 * 128).view(2, 8, 128).mul(30).sin()


def shrink(config: Any) -> Any:
    """In place: every field of SMALL that the config has, in it and in the configs inside of it; no dropout."""
    for field, value in SMALL.items():
        old = getattr(config, field, None)
        if (
            old is not None
            and not isinstance(old, bool | dict)
            and isinstance(old, list | tuple) == isinstance(value, list | tuple)
        ):
            try:
                setattr(config, field, value)
            except (AttributeError, ValueError, NotImplementedError):
                continue
        elif isinstance(value, bool) and hasattr(config, field):
            setattr(config, field, value)
    for field, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            shrink(value)
        elif ("drop" in field or "pdrop" in field) and isinstance(value, float):
            setattr(config, field, 0.0)
        elif field == "layer_types" and isinstance(value, list):
            setattr(config, field, (value[:1] + [t for t in dict.fromkeys(value) if t != value[0]] + value)[:2])
    return config


def build(model_type: str, *, seed: int = 0) -> nn.Module:
    """The family's model with its main head, in eval(), biases off zero. Raises whatever its config does not like."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    config = shrink(transformers.AutoConfig.for_model(model_type))
    config = type(config)(**{k: v for k, v in config.to_dict().items() if k not in ("layer_types", "model_type")})
    shrink(config)
    tables = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "CTC", "MASKED_LM", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
    names = [getattr(auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).get(model_type) for table in tables]
    name = next((n for n in names if n), auto.MODEL_MAPPING_NAMES.get(model_type))
    torch.manual_seed(seed)
    model = getattr(transformers, name[0] if isinstance(name, tuple | list) else name)(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias") or parameter.dim() == 1:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """What the model's forward takes, by the names of its arguments."""
    known = {
        "input_ids": IDS, "pixel_values": PIXELS, "input_values": WAVE, "input_features": MEL,
        "decoder_input_ids": IDS.flip(1),
    }  # fmt: skip
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in known.items() if name in taken}


def answer(model: nn.Module) -> Tensor:
    """The first floating tensor that the model answers."""
    torch.manual_seed(0)  # for what draws in its forward
    answers = model(**inputs(model))
    for value in answers.values() if hasattr(answers, "values") else answers:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return value
    raise TypeError(f"{type(model).__name__} answers nothing")
