"""What a run is about to do, in a few lines, so that a mistake is seen before the hours are spent."""

import warnings

from lowrank.checkpoint.gather import own_class
from lowrank.data.chat.dates import writes_date
from lowrank.data.chat.template import template_hash
from lowrank.data.dataset import Dataset
from lowrank.data.recipe import Recipe
from lowrank.data.rows import JUDGES
from lowrank.data.tokens import Encoded
from lowrank.errors import LowrankWarning, quoted
from lowrank.injection.quantise import what_is_held
from lowrank.kernels.processor import warning_of_slow_products
from lowrank.train import processes
from lowrank.train.chunked import chunk_size
from lowrank.train.dealt_out import said
from lowrank.train.evaluation import Measure
from lowrank.train.loss import LossOf
from lowrank.train.losses import NextToken, squared_error
from lowrank.train.preference import PreferenceLoss
from lowrank.train.settings import TrainSettings
from lowrank.train.task import Loaded

NAMED = 5  # columns
LARGE = 100  # labels to predict


def summarise(
    settings: TrainSettings,
    loaded: Loaded,
    adapted: str,
    measure: Measure,
    rows: Dataset,
    data: Encoded,
    evaluated: Encoded | None,
    recipe: Recipe,
    steps: int,
) -> list[tuple[str, str]]:
    """(what, value) pairs. Warns of what will probably not go as meant."""
    _warn(settings, rows, data, loaded)
    kind = own_class(loaded.model).__name__
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    lines = [
        ("model", f"{settings.model} ({kind}, {dtype}, {loaded.device})"),
        ("trained", adapted),
        *data_lines(rows, data, recipe),
        *_packing(settings, rows, data, recipe),
        ("loss", _loss(measure.loss, loaded, data)),
        ("steps", f"{steps:,} of {settings.batch_size} rows{_passes(settings, len(data.examples), steps)}"),
        ("rate", _rate(settings, steps)),
        ("out", settings.out),
    ]
    if processes.grouped():
        lines.insert(-2, ("processes", said(settings, loaded.model)))
    if evaluated:
        held = f"{settings.eval_split:.0%} of the data, held out" if settings.eval_split else "the folder's own part"
        where = settings.eval_data or held
        lines.insert(-3, ("evaluation", f"{where}: {len(evaluated.examples):,} rows{_cut(evaluated)}"))
    if settings.sample_prompts:
        lines.insert(-3, ("samples", f"answers of up to {settings.sample_tokens} tokens at each evaluation"))
    if (form := what_is_held(loaded.model)) is not None:
        lines.insert(1, ("held in", str(form)))
    if loaded.fresh and not settings.full:
        lines.insert(2, ("new", f"{', '.join(loaded.fresh)} starts from the seed, trained and saved in full"))
    return lines


def _rate(settings: TrainSettings, steps: int) -> str:
    b = f", {settings.rate * settings.lr_ratio:g} for B (LoRA+)" if settings.lr_ratio != 1 else ""
    return f"{settings.rate:g}{b}, {settings.schedule} after {round(settings.warmup * steps)} steps of warm-up"


def data_lines(rows: Dataset, data: Encoded, recipe: Recipe) -> list[tuple[str, str]]:
    """What the rows are, what is not used of them, by whose template they are written, what is trained."""
    count = data.packed or len(data.examples)
    lines = [("data", f"{rows.path}: {count:,} rows of {rows.kind}{_cut(data)}")]
    if rows.unused:
        lines.append(("not used", _unused(rows)))
    if recipe.chat_template:
        lines.append(("template", _template(recipe)))
    return [*lines, ("tokens", _tokens(rows, data) + ("; reused" if data.reused else ""))]


def _packing(settings: TrainSettings, rows: Dataset, data: Encoded, recipe: Recipe) -> list[tuple[str, str]]:
    if not settings.pack:
        return []
    if not data.packed:
        return [("packing", f"rows of {rows.kind} are not put end to end; those of like length go together instead")]
    packs, room = len(data.examples), recipe.max_length
    filled = data.tokens / (packs * room)
    return [("packing", f"{data.packed:,} rows in {packs:,} of up to {room:,} tokens, {filled:.1%} filled")]


def _template(recipe: Recipe) -> str:
    """Whose words are put around a conversation; a date among them makes another day's rows other rows."""
    date = f"; it writes a date, {recipe.date} in this run" if recipe.date else ""
    if writes_date(recipe.dated_template):
        date = "; it writes the date of the day, which cannot be fixed for a run: other rows tomorrow"
    return f"{recipe.template_of} ({template_hash(recipe.chat_template)}){date}"


def _unused(rows: Dataset) -> str:
    """A column left out on purpose is no fault, one that was forgotten is: alpaca's `input` in two rows of five."""
    names = [f"{quoted(name)} ({count:,} rows)" for name, count in rows.unused[:NAMED]]
    more = f" and {len(rows.unused) - NAMED} more" if len(rows.unused) > NAMED else ""
    return f"columns {', '.join(names)}{more}"


def _cut(data: Encoded) -> str:
    """What was done with rows that are too long, or that their template would write in another way later."""
    done = {
        "cut to the longest length": data.cut,
        "split into pieces of it": data.split,
        "left out": data.dropped,
        "conversations became several rows, since the template rewrites earlier turns": data.rewritten,
    }
    return "".join(f", {count:,} {what}" for what, count in done.items() if count)


def _tokens(rows: Dataset, data: Encoded) -> str:
    if rows.kind in JUDGES:
        return f"{data.tokens:,} in a pass"
    return f"{data.trained:,} trained of {data.tokens:,} in a pass ({data.trained / data.tokens:.1%})"


def _loss(loss: LossOf, loaded: Loaded, data: Encoded) -> str:
    if isinstance(loss, NextToken | PreferenceLoss):
        what = f"DPO, β {loss.beta:g}" if isinstance(loss, PreferenceLoss) else "next token"
        if loss.head is None:
            return f"{what}, all logits at once: the head of {own_class(loaded.model).__name__} does not run alone"
        return f"{what}, at most {chunk_size(loss.head.vocabulary):,} positions before the head at once"
    if loss is squared_error:
        least, largest = data.between
        return f"mean squared error; labels from {least:g} to {largest:g}"
    return "cross-entropy of the labels"


def _passes(settings: TrainSettings, rows: int, steps: int) -> str:
    micro = settings.micro_batch
    parts = f" in parts of {micro}" if micro and micro < settings.batch_size else ""
    return f"{parts}, {steps * settings.batch_size / rows:.2g} passes over the data"


def _warn(settings: TrainSettings, rows: Dataset, data: Encoded, loaded: Loaded) -> None:
    if slow := warning_of_slow_products(next(loaded.model.parameters()).dtype, loaded.device.type):
        warnings.warn(slow, LowrankWarning, stacklevel=2)
    if rows.kind not in JUDGES and loaded.tokenizer.eos_token_id is None:
        warnings.warn(
            f"the tokenizer of {settings.model} has no token that ends a text, so the model cannot learn to stop",
            LowrankWarning,
            stacklevel=2,
        )
    if rows.kind == "regression" and (largest := max(map(abs, data.between))) > LARGE:
        warnings.warn(
            f"{rows.path}: labels go up to {largest:g}, and a head that starts near 0 learns such numbers slowly; "
            "divide them first",
            LowrankWarning,
            stacklevel=2,
        )
    if data.dropped:
        warnings.warn(
            f"{rows.path}: {data.dropped} of {len(rows.rows)} rows are left out: what is trained in them is longer "
            "than the longest length, or nothing; raise --max-length, or shorten them",
            LowrankWarning,
            stacklevel=2,
        )
    if (
        rows.kind == "completion"
        and settings.train_on != "all"
        and data.tokens == data.trained + (data.packed or len(data.examples))  # all but the first of each
    ):
        warnings.warn(
            f"{rows.path}: every token is trained, the prompts have become no tokens at all; is --template right?",
            LowrankWarning,
            stacklevel=2,
        )
