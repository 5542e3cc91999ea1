"""Finding a model, and loading it and its tokenizer from a folder: never with code that came with the model."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank import launch
from lowrank.errors import CheckpointError, ConfigError, LowrankError, LowrankWarning, short
from lowrank.files.json_file import read_object
from lowrank.hub import EVERYTHING, local_folder
from lowrank.modelfiles.base import read_base
from lowrank.train.settings import MachineSettings

LONGEST = 512  # tokens, where neither the user nor the model says less
OFFLINE = {"local_files_only": True, "trust_remote_code": False}

Loader = Callable[[Any], Any]  # from an auto class of transformers to what loads models of it


def as_it_is(auto: Any) -> Any:
    """The auto class itself."""
    return auto


def find_model(name: str, files: Sequence[str] = EVERYTHING) -> Path:
    """The folder `--model` means: a path, "nano" for the model that ships with lowrank, or a model's name on the Hub.

    files: patterns of what a model on the Hub is needed for. Raises ConfigError for anything that is not a folder with
    a config.json, CheckpointError where that is damaged or cannot be fetched.
    """
    if name == "nano" and not Path(name).is_dir():
        from lowrank.nano import model_path

        return model_path()
    folder = local_folder(name, files)
    wanted = 'give the folder of a transformers model, a name on the Hub (org/name), or "nano"'
    if not folder.is_dir():
        raise ConfigError(f"model {name}: there is no such folder; {wanted}")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it holds an adapter, which goes to --adapter" if adapter else "it holds no config.json"
        raise ConfigError(f"model {name}: {hint}; {wanted}")
    _read_config(folder)
    return folder


def device_of(settings: MachineSettings) -> torch.device:
    """The device asked for, or the first GPU, or the CPU. Raises ConfigError for a device that is not there."""
    if settings.device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device()) if launch.count() > 1 else torch.device("cuda")
    here = _devices()
    if settings.device not in here:
        raise ConfigError(f"--device {settings.device}: torch has no such device here, only {', '.join(here)}")
    return torch.device(settings.device)


def _devices() -> list[str]:
    """The names of all devices that torch can compute on here."""
    found = ["cpu"]
    for name, count in (("cuda", torch.cuda.device_count()), ("xpu", torch.xpu.device_count())):
        found += [name, *(f"{name}:{i}" for i in range(count))] if count else []
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def dtype_of(settings: MachineSettings, device: torch.device) -> torch.dtype:
    """The dtype asked for, or float32 on a CPU and bfloat16 elsewhere."""
    dtype = getattr(torch, settings.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in the model's folder. Raises CheckpointError where there is none, or it is damaged."""
    from transformers import AutoTokenizer

    with loading(folder, "no tokenizer could be loaded from this folder"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **OFFLINE)
    # told once, it says nothing of rows longer than the model: we cut or refuse them, in our own words
    getattr(tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def quantiser_in(folder: Path) -> bool:
    """Whether config.json says that the model's files are quantised."""
    return _read_config(folder).get("quantization_config") is not None


def check_stored(folder: Path) -> None:
    """Raise CheckpointError for a quantised model by a method that nobody here reads, and for one of damaged parts.

    transformers tells neither in a sentence, and computes with scales that are too few.
    """
    said = _read_config(folder).get("quantization_config")
    if said is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = said.get("quant_method") if isinstance(said, dict) else said
    known = {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes", None}  # the oldest files say no method
    if not isinstance(method, str | None) or method not in known:
        raise CheckpointError(
            f"model {folder}: config.json says that it is quantised by {short(repr(method), 60)}, a method that "
            "transformers does not know: give the model that it was made from"
        )
    if any(folder.glob("*.safetensors")):
        read_base(folder)  # whose parts are missing, or do not fit, is said


def config_of(folder: Path) -> Any:
    """The config of a model. Raises CheckpointError for one that transformers cannot read."""
    from transformers import AutoConfig

    with loading(folder, "its config is none that transformers reads"):
        return AutoConfig.from_pretrained(str(folder), **OFFLINE)


def load_causal(folder: Path, dtype: torch.dtype, load: Loader = as_it_is, **options: Any) -> nn.Module:
    """The causal language model in a folder. Raises CheckpointError for other models and damaged files.

    load: what is to load it in the place of transformers' class; options: of transformers' from_pretrained.
    """
    from transformers import AutoModelForCausalLM

    _check_causal(folder)
    check_stored(folder)
    with loading(folder, "not loadable as a causal language model"):
        model, info = load(AutoModelForCausalLM).from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, **OFFLINE, **options
        )
    if info["missing_keys"]:
        raise CheckpointError(
            f"model {folder}: {len(info['missing_keys'])} weights of {type(model).__name__} are not in its files "
            f"({_some(info['missing_keys'])}); is it a language model?"
        )
    return _checked(model, info, folder)


def load_judge(
    folder: Path, labels: Sequence[str], dtype: torch.dtype, load: Loader = as_it_is, **options: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """(model, modules that start new) of a sequence classifier with these labels; without any, one that says a number.

    options: of transformers' from_pretrained. A head for other labels is replaced by a new one, made from torch's
    random state. The modules that start new are found by what the files lack; they must be trained and saved in full.
    """
    from transformers import AutoModelForSequenceClassification

    check_stored(folder)
    with loading(folder, "not loadable as a sequence classifier"):
        model, info = load(AutoModelForSequenceClassification).from_pretrained(
            str(folder),
            dtype=dtype,
            **answers_of(labels),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **OFFLINE,
            **options,
        )
    fresh = {str(key) for key in info["missing_keys"]} | {_key(item) for item in info["mismatched_keys"]}
    inside = [key for key in fresh if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if inside:
        raise CheckpointError(
            f"model {folder}: {len(inside)} weights of {type(model).__name__} are not in its files ({_some(inside)})"
        )
    return _checked(model, info, folder), tuple(sorted({key.rpartition(".")[0] for key in fresh}))


def answers_of(labels: Sequence[str]) -> dict[str, Any]:
    """What a config says of the answers of a classifier, or of a regressor."""
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    numbers = {label: number for number, label in enumerate(labels)}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": numbers}


def head_modules(model: Any, fresh: Sequence[str]) -> tuple[str, ...]:
    """The modules of a classifier to train and save in full: its head, and what else starts new."""
    base = model.base_model
    outside = {name: module for name, module in model.named_children() if module is not base}
    heads = [name for name, module in outside.items() if next(module.parameters(), None) is not None]
    return (*heads, *(path for path in fresh if path.split(".")[0] not in heads))


def own_labels(folder: Path) -> tuple[str, ...]:
    """The label names a classifier was saved with; empty for other models and for nameless labels (LABEL_0...)."""
    config = _read_config(folder)
    names = config.get("id2label")
    classifies = any("ForSequenceClassification" in str(name) for name in config.get("architectures") or [])
    if not classifies or not isinstance(names, dict) or any(str(n).startswith("LABEL_") for n in names.values()):
        return ()
    return tuple(str(names[number]) for number in sorted(names, key=int))


def longest_row(model: Any, tokenizer: Any, asked: int | None) -> int:
    """The length rows are cut to. Raises ConfigError for more than the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = [n for n in (positions, tokenizer.model_max_length) if isinstance(n, int) and n < 10**9]
    most = min(limits) if limits else None
    if asked is not None and most is not None and asked > most:
        raise ConfigError(f"--max-length {asked}: this model holds {most} tokens")
    return asked or min(LONGEST, most or LONGEST)


def pad_token(model: Any, tokenizer: Any) -> int:
    """A token to fill rows up with. A classifier finds the end of a row by it, so its config is told, in place."""
    candidates = (tokenizer.pad_token_id, model.config.pad_token_id, tokenizer.eos_token_id)
    pad = next((token for token in candidates if token is not None), 0)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad
    return int(pad)


def checkpoint_activations(model: Any) -> None:
    """In place: keep few activations and compute the others again when the gradient needs them."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "config.json", "it must hold one JSON object, copy the model again")
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"model {folder}: config.json is damaged ({error})") from None


def _check_causal(folder: Path) -> None:
    """transformers builds a decoder out of an encoder's files without a word; the answers are noise."""
    names = _read_config(folder).get("architectures") or []
    other = [str(name) for name in names if "MaskedLM" in str(name) or "Classification" in str(name)]
    if other:
        raise CheckpointError(f"model {folder}: a {other[0]} does not write text; give a causal language model")


def _checked(model: Any, info: dict[str, Any], folder: Path) -> nn.Module:
    strange = [key for key in info["unexpected_keys"] if "rotary_emb" not in key]
    parts = {str(name).split(".")[0] for name, _ in model.named_parameters()}
    if strange and not parts & {str(key).split(".")[0] for key in strange}:
        strange = []  # another model's head, which this one does without
    if strange:
        warnings.warn(
            f"model {folder}: {len(strange)} tensors in its files are not used ({_some(strange)})", LowrankWarning, 3
        )
    assert isinstance(model, nn.Module)
    return model


def _key(item: Any) -> str:
    """transformers lists mismatched keys alone or with their two shapes, by version."""
    return str(item if isinstance(item, str) else item[0])


def _some(keys: Any) -> str:
    names = sorted(str(key) for key in keys)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@contextmanager
def loading(folder: Path, what: str) -> Iterator[None]:
    """Whatever transformers raises for a folder it cannot read, as one sentence; and no bars or reports meanwhile."""
    with quiet():
        try:
            yield
        except ImportError as error:
            text = " ".join(str(error).split())
            what = "a package it needs is not installed"
            if "GPU" in text:  # what transformers says of forms that have no other kernels
                what = "it is in a form that takes a GPU, or give the model that it was made from"
            elif "bitsandbytes" in text:
                what += ": pip install 'lowrank[quant]'"
            raise CheckpointError(f"model {folder}: {what} ({text:.200})") from error
        except LowrankError:
            raise
        except Exception as error:  # each of its parts has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"model {folder}: {what}: {reason:.300}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and log lines, as it was afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
