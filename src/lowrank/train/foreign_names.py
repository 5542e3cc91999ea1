"""What PEFT, TRL, transformers, mlx-lm and others call our settings, and what was perhaps meant by a name we lack."""

from collections.abc import Collection
from difflib import get_close_matches

NEAR = 0.75  # difflib's ratio: "rnk" and "rank" are 0.86, "foo" and "out" 0.33

# {their name: ours}; where a name means one thing here and another there, the first that the command has
FOREIGN: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "output_dir": ("out",),
    "output": ("out",),
    "output_path": ("out",),
    "outfile": ("out",),
    "save_path": ("out",),
    "iters": ("steps",),
    "max_steps": ("steps",),
    "num_train_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "max_epochs": ("epochs",),
    "per_device_train_batch_size": ("batch_size",),
    "train_batch_size": ("batch_size",),
    "per_device_eval_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("micro_batch",),
    "micro_batch_size": ("micro_batch",),
    "r": ("rank",),
    "lora_r": ("rank",),
    "lora_rank": ("rank",),
    "lora_dim": ("rank",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "lora_bias": ("bias",),
    "lora_target_modules": ("targets",),
    "target_modules": ("targets",),
    "exclude_modules": ("exclude",),
    "trainable_token_indices": ("trainable_tokens",),
    "lora_target_parameters": ("target_parameters",),
    "layers_to_transform": ("layers",),
    "num_layers": ("layers",),
    "init_lora_weights": ("init",),
    "use_dora": ("dora",),
    "use_rslora": ("rslora",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "cutoff_len": ("max_length",),
    "block_size": ("max_length",),
    "model_name_or_path": ("model",),
    "pretrained_model_name_or_path": ("model",),
    "base_model_name_or_path": ("model",),
    "base_model": ("model",),
    "base": ("model",),
    "model_name": ("model",),
    "model_id": ("model",),
    "model_path": ("model",),
    "dataset": ("data",),
    "dataset_name": ("data",),
    "data_path": ("data",),
    "train_file": ("data",),
    "train_data": ("data",),
    "adapter_path": ("adapter", "out"),
    "adapter_name_or_path": ("adapter", "out"),
    "adapters": ("adapter",),
    "lora": ("adapter",),
    "lora_path": ("adapter",),
    "peft_model": ("adapter",),
    "validation_file": ("eval_data",),
    "eval_file": ("eval_data",),
    "eval_dataset": ("eval_data",),
    "val_batches": ("eval_rows", "rows"),
    "max_eval_samples": ("eval_rows", "rows"),
    "val_set_size": ("eval_split",),
    "steps_per_eval": ("eval_every",),
    "eval_steps": ("eval_every",),
    "steps_per_report": ("log_every",),
    "logging_steps": ("log_every",),
    "save_steps": ("save_every",),
    "save_total_limit": ("keep_checkpoints",),
    "resume_from_checkpoint": ("resume",),
    "early_stopping_patience": ("patience", "keep"),
    "load_best_model_at_end": ("keep",),
    "grad_checkpoint": ("gradient_checkpointing",),
    "loraplus_lr_ratio": ("lr_ratio",),
    "warmup_ratio": ("warmup",),
    "warmup_steps": ("warmup",),
    "lr_scheduler_type": ("schedule",),
    "lr_schedule": ("schedule",),
    "scheduler": ("schedule",),
    "max_grad_norm": ("clip",),
    "adam_beta1": ("beta1",),
    "optim": ("optimizer",),
    "attn_implementation": ("attention",),
    "flash_attention": ("attention",),
    "adam_beta2": ("beta2",),
    "torch_dtype": ("dtype",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "precision": ("dtype",),
    "outtype": ("dtype",),
    "load_in_4bit": ("quantise",),
    "load_in_8bit": ("quantise",),
    "packing": ("pack",),
    "train_on_inputs": ("train_on",),
    "completion_only_loss": ("train_on",),
    "assistant_only_loss": ("train_on",),
    "mask_prompt": ("train_on",),
    "dataset_text_field": ("text_column",),
    "max_tokens": ("max_new_tokens",),
    "combination_type": ("method",),
    "prompt_template": ("template",),
    "random_seed": ("seed",),
}
COMMANDS = {
    "finetune": "train",
    "fine-tune": "train",
    "sft": "train",
    "lora": "train",
    "fuse": "merge",
    "evaluate": "eval",
    "test": "eval",
    "chat": "generate",
    "sample": "generate",
    "infer": "generate",
    "predict": "generate",
    "export": "convert",
    "info": "inspect",
    "average": "combine",
}


def ours(name: str, known: Collection[str]) -> str | None:
    """The one of `known` that other programs call `name`, however its words are joined; None where there is none."""
    plain = name.lower().replace("-", "_")
    joined = {their.replace("_", ""): their for their in FOREIGN}
    found = FOREIGN.get(joined.get(plain.replace("_", ""), ""), ())
    return next((one for one in found if one in known), None)


def near(name: str, known: Collection[str]) -> str | None:
    """The one of `known` that `name` is a slip of, or the only one that it begins; None where none is near."""
    plain = name.lower().replace("-", "_")
    close = get_close_matches(plain, known, n=1, cutoff=NEAR)
    begun = [one for one in known if len(plain) > 2 and one.startswith(plain)]
    return close[0] if close else begun[0] if len(begun) == 1 else None
