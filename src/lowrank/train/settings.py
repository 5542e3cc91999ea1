"""What a user may ask of train, eval and generate: one table of names for flags, YAML and the library."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, field_validator, model_validator

from lowrank.data.names import unescape, whole
from lowrank.data.settings import DataSettings, Names, Numbers, Pairs, Settings, Texts, Tokens
from lowrank.data.sources import VALID, has_part
from lowrank.errors import ConfigError
from lowrank.train.state.settings import CheckpointSettings

MOST_STEPS, MOST_EPOCHS = 10**9, 10**6  # more is a slip, and would be waited for in vain
LEAST_TEMPERATURE = 1e-3
SAMPLE_TOKENS = 64


class TargetSettings(Settings):
    """Which modules get a low-rank change, of which rank and scale: h = W0·x + s·B·A·x, s = alpha/rank."""

    rank: int = Field(8, description="Rank r of the change of every target")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Scale is alpha / rank; twice the rank where not given"
    )
    targets: str | tuple[str, ...] | None = Field(
        None,
        description='Modules to adapt: names with commas (q_proj,v_proj), "all-linear", or one regular expression; '
        "the query and value projections where not given",
    )
    exclude: Names = Field((), description="Modules to leave out, names with commas")
    layers: Numbers = Field((), description="Numbers of the layers to adapt, with commas; all where not given")
    rslora: bool = Field(False, description="Scale by alpha / √rank instead")


class AdapterSettings(TargetSettings):
    """Which low-rank change is learned, and how it starts."""

    target_parameters: str | tuple[str, ...] | None = Field(
        None,
        description="Stacks of a mixture's experts to adapt (gate_up_proj,down_proj), named as targets are; "
        '"all-linear" means all of them where not given',
    )
    expert_rank: int | None = Field(None, description="Rank of every expert's change; --rank where not given")
    dropout: float = Field(0.0, description="Dropout on the input of A while training")
    init: str = Field(
        "gaussian",
        description="gaussian, kaiming, orthogonal, olora, pissa, pissa_niter_N (fast pissa) or, with quantise, loftq "
        "(or loftq_N, N rounds that move the base for this adapter alone)",
    )
    dora: bool = Field(False, description="Learn a magnitude per output row beside the direction (DoRA)")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained too")
    modules_to_save: Names = Field((), description="Modules to train and save in full, names with commas")
    trainable_tokens: Tokens = Field(
        (),
        description="Tokens of which the rows in the table (and in a head that is not tied to it) are trained too: "
        "tokens or their ids, with commas",
    )
    rank_pattern: Annotated[dict[str, int], Pairs] = Field(
        {}, description="Other ranks by a regex that ends a name, as in q_proj=4,layers.0.up_proj=2"
    )
    alpha_pattern: Annotated[dict[str, PositiveFloat], Pairs] = Field(
        {}, description="Other alphas by a regex that ends a name, as in q_proj=8"
    )


class StepSettings(Settings):
    """How long and how fast a training is, and on which rows it is measured."""

    steps: int | None = Field(None, ge=1, le=MOST_STEPS, description="Optimiser steps to take")
    epochs: float | None = Field(
        None, gt=0, le=MOST_EPOCHS, description="Or passes over the data; 1 where neither is given"
    )
    batch_size: int = Field(8, ge=1, description="Rows in one optimiser step")
    micro_batch: int | None = Field(
        None, ge=1, description="Rows in one forward pass: less memory, same result; all of them where not given"
    )
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        2e-4, description="Learning rate at its highest; auto: by the width of a Llama or Qwen"
    )
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear", description="How the rate falls after warm-up; wsd: over the last fifth of the steps"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW's weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    clip: float = Field(1.0, ge=0, allow_inf_nan=False, description="Largest norm of the gradient; 0 for no limit")
    group_by_length: bool = Field(False, description="Put rows of like length together: less padding, another order")
    eval_data: str | None = Field(None, description="File to evaluate on while training")
    eval_split: float = Field(0.0, ge=0, lt=1, description="Or the share of --data to hold out, chosen by the seed")
    eval_rows: int | None = Field(None, ge=1, description="Evaluate on so many rows, spread evenly; all if not given")
    seed: int = Field(0, ge=0, lt=2**63, description="Start of everything random; same seed, same bytes")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(
                f"micro_batch is the part of a step's rows in one pass, so {self.micro_batch} cannot be more than "
                f"batch_size, {self.batch_size}"
            )
        return self

    @property
    def rate(self) -> float:
        """The learning rate at its highest. Raises ConfigError while "auto" is not yet a number."""
        if isinstance(self.lr, str):
            raise ConfigError("--lr auto is for `lowrank train`: give a number")
        return self.lr


class LoopSettings(StepSettings):
    """What is looked at on the way, what is kept, and what memory it may take."""

    beta: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="How near preferences stay to the model without the adapter (DPO's β); 0.1 where not given",
    )
    pack: bool = Field(
        False, description="Put rows end to end up to the longest length, apart from each other: little padding"
    )
    gradient_checkpointing: bool = Field(False, description="Compute activations twice: slower, much less memory")
    eval_every: int | None = Field(None, ge=1, description="Steps between evaluations; a fifth of all if not given")
    metrics: Names = Field(
        (), description="What evaluations give beside the usual, names with commas: bleu, chrf, f1, rouge"
    )
    sample_prompts: Texts = Field(
        (),
        description="Have these answered at each evaluation: a text, or a file of prompts (a line each; jsonl with "
        "prompt or messages); repeat the flag for several",
    )
    sample_tokens: int = Field(SAMPLE_TOKENS, ge=1, description="Tokens of such an answer at most")
    keep: Literal["last", "best"] = Field("last", description="Save the last weights, or those of the best evaluation")
    patience: int | None = Field(
        None, ge=1, description="Stop after so many evaluations without a lower loss, and save the best weights"
    )
    optimizer: Literal["adamw", "adamw8bit", "adamw-unfused"] = Field(
        "adamw",
        description="adamw (torch's fused step), adamw8bit (moments in 8 bits; needs bitsandbytes), adamw-unfused (as "
        "runs began before there was a choice)",
    )
    lr_ratio: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="LoRA+: the rate of B over that of A, which is lr; as in 16"
    )
    init_from: str | None = Field(
        None, description="Train on from an adapter, its folder or its name on the Hub; it says what is adapted"
    )
    log_to: Names = Field((), description="Report to these too, names with commas: tensorboard, wandb, mlflow, trackio")
    log_every: int = Field(10, ge=1, description="Steps between lines of the log")


class MachineSettings(Settings):
    """Where the model is put and in which numbers its frozen weights are held."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of the frozen weights; float32 on a CPU and bfloat16 on a GPU where not given"
    )
    device: str | None = Field(None, description="cpu, cuda, cuda:1...; a GPU if there is one, where not given")
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = Field(
        None, description="How attention is computed; as transformers chooses (mostly sdpa) where not given"
    )


class HeldSettings(MachineSettings):
    """In how many bits the frozen weights are held."""

    quantise: Literal["nf4", "fp4", "int8"] | None = Field(
        None, description="Hold the frozen linear layers in 4 or 8 bits (needs bitsandbytes); as loaded if not given"
    )
    double: bool = Field(False, description="With nf4 or fp4: quantise the scales too")

    @model_validator(mode="after")
    def _has_scales(self) -> Self:
        if self.double and self.quantise not in ("nf4", "fp4"):
            raise ValueError("double means the scales of nf4 or fp4: say quantise too")
        return self


class ShardSettings(HeldSettings):
    """Whether each of several processes holds all of the frozen weights."""

    shard: bool | None = Field(
        None,
        description="Give every process a part of the frozen weights, gathered in use (FSDP2); where not given, if one "
        "GPU cannot hold them",
    )


class RunSettings(DataSettings, StepSettings, MachineSettings):
    """What every kind of training needs."""

    model: str = Field(description='A model: its folder, its name on the Hub (org/name), or "nano", the shipped one')
    data: str = Field(description="A file of rows, several with commas, or a folder with train.*, valid.*, test.*")


class TrainSettings(AdapterSettings, LoopSettings, RunSettings, ShardSettings, CheckpointSettings):
    """Everything `lowrank.train.run` needs. `model`, `data` and `out` are required."""

    out: str = Field(description="The folder to make: adapter, log and resolved settings")
    full: bool = Field(False, description="Train every weight instead, and save a whole model")

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        faults = []
        if self.steps is not None and self.epochs is not None:
            faults.append("steps and epochs cannot both be given")
        if self.eval_data is not None and self.eval_split:
            faults.append("eval_data and eval_split cannot both be given")
        evaluated = self.eval_data is not None or bool(self.eval_split) or has_part(self.data, VALID)
        asked = {"eval_rows", "eval_every", "metrics", "patience", "sample_prompts"} & self.model_fields_set
        if not evaluated and (self.keep == "best" or any(getattr(self, name) not in (None, ()) for name in asked)):
            faults.append(
                "keep, eval_rows, eval_every, metrics, patience and sample_prompts need eval_data, eval_split or a "
                "folder with valid.*"
            )
        idle = self.model_fields_set & set(AdapterSettings.model_fields)
        if self.full and idle:
            faults.append(f"full trains every weight, so {', '.join(sorted(idle))} cannot be meant")
        if self.init_from is not None and (idle or self.full):
            said = "full" if self.full else ", ".join(sorted(idle))
            faults.append(f"init_from trains on what the adapter has, so {said} cannot be meant")
        if self.sample_tokens != SAMPLE_TOKENS and not self.sample_prompts:
            faults.append("sample_tokens is of the answers to sample_prompts: give them too")
        if self.full and self.lr_ratio != 1:
            faults.append("lr_ratio is between an adapter's B and A, and full has none: leave it out")
        if self.full and self.quantise:
            faults.append("full trains every weight, and quantised ones are frozen: leave quantise out")
        if self.full and self.shard:
            faults.append("shard deals out frozen weights, and full trains every weight: leave one of them out")
        if self.quantise and self.shard:
            faults.append("shard deals out rows of weights, which quantised ones have not: leave shard or quantise out")
        if self.init.startswith("loftq") and not self.quantise:
            faults.append("init loftq starts from what quantising takes off: say quantise too")
        if self.dtype == "float16":
            faults.append("dtype float16 overflows in training: use bfloat16 or float32")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def resolved(self) -> dict[str, object]:
        """Every setting that has a meaning in this run, ready to be written down and read again."""
        idle = set(AdapterSettings.model_fields) if self.full or self.init_from is not None else set()
        values = self.model_dump(mode="json", exclude=idle)
        return {name: values[name] for name in sorted(values, key=_own_first)}


def _own_first(name: str) -> bool:
    """Sorts model, data and out, which every run says anew, before what it mostly leaves at rest."""
    return name not in ("model", "data", *TrainSettings.__annotations__)


class EvalSettings(DataSettings, HeldSettings):
    """Everything `lowrank.train.evaluate` needs. What an adapter was trained with holds where nothing else is given."""

    model: str = Field(description='A model: its folder, its name on the Hub, or "nano"')
    data: str = Field(description="A file of rows, several with commas, or a folder with train.*, valid.*, test.*")
    adapter: str | None = Field(
        None, description="An adapter: a folder, or a name on the Hub; the bare model if not given"
    )
    rows: int | None = Field(None, ge=1, description="Evaluate on so many rows, spread evenly over the file")
    batch_size: int = Field(16, ge=1, description="Rows in one forward pass")
    beta: float | None = Field(None, gt=0, allow_inf_nan=False, description="Of preferences; what was trained with")
    metrics: Names = Field((), description="What to give beside the usual, names with commas: bleu, chrf, f1, rouge")


class GenerateSettings(HeldSettings):
    """Everything `lowrank.train.generate` needs."""

    model: str = Field(description='A model: its folder, its name on the Hub, or "nano"')
    prompt: Annotated[str | None, BeforeValidator(whole)] = Field(
        None, description="The prompt, put into the template of the adapter if it has one"
    )
    chat: bool = Field(False, description="Talk with the model, turn by turn, in its chat template")
    system: Annotated[str | None, BeforeValidator(whole)] = Field(
        None, description="What the model is told before the first turn of a chat"
    )
    chat_template: str | None = Field(
        None, description="File of a chat template; the one trained with, or the tokenizer's, where not given"
    )
    adapter: str | None = Field(
        None, description="An adapter: a folder, or a name on the Hub; the bare model if not given"
    )
    template: Annotated[str | None, BeforeValidator(unescape)] = Field(
        None, description='Another template, as in "Q: {prompt}\\nA:"; the adapter\'s where not given'
    )
    max_new_tokens: int = Field(128, ge=1, description="Tokens to write at most")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0 takes the likeliest token; 1 samples")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that hold this probability")
    seed: int = Field(0, ge=0, lt=2**63, description="Start of the sampling")

    @model_validator(mode="after")
    def _asks_in_one_way(self) -> Self:
        if self.chat and self.prompt is not None:
            raise ValueError("chat reads what you say from the terminal: leave prompt out, or chat")
        if self.template is not None and (self.chat or self.chat_template is not None):
            raise ValueError("template is for a bare prompt, and a chat has its chat template: give one of both")
        if not self.chat and self.prompt is None:
            raise ValueError("--prompt is needed: what the model goes on from; or chat, to talk with it")
        return self

    @field_validator("temperature")
    @classmethod
    def _divides_logits(cls, value: float) -> float:
        if 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"logits divided by so little are no numbers; 0 is greedy, {LEAST_TEMPERATURE} almost")
        return value
