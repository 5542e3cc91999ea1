"""From settings to a training that could begin: rows as tokens, the model, what of it is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank.checkpoint.outputs import Inputs
from lowrank.checkpoint.read import open_adapter
from lowrank.data.dataset import Dataset, read_dataset, split
from lowrank.data.met import warn_of_met
from lowrank.data.prompts import read_prompts
from lowrank.data.recipe import Recipe
from lowrank.data.sources import TEST, VALID, has_part
from lowrank.data.tokens import Encoded, encode
from lowrank.errors import DataError
from lowrank.hub import pinned
from lowrank.train import processes
from lowrank.train.adamw import check_optimizer
from lowrank.train.adapting import adapt, lora_config
from lowrank.train.asked import check_kind
from lowrank.train.attention import attention_options
from lowrank.train.auto_rate import SOURCE, auto_rate
from lowrank.train.dealt_out import is_dealt_out, whole_of
from lowrank.train.evaluation import Measure
from lowrank.train.loop import Loop, steps_of
from lowrank.train.models import device_of, dtype_of, find_model
from lowrank.train.packing import flattened, packed
from lowrank.train.recipes import labels_of, recipe_of
from lowrank.train.reporting import Reporter, Sample
from lowrank.train.samples import Samples
from lowrank.train.settings import RunSettings, TrainSettings
from lowrank.train.sinks.sink import check_sinks
from lowrank.train.state.randomness import reseed
from lowrank.train.summary import summarise
from lowrank.train.task import Loaded, load
from lowrank.train.watch import Watch


@dataclass(frozen=True, slots=True)
class Prepared:
    """settings: with names on the Hub pinned, and what was found out; base: the model's folder; adapted: in words.

    samples: the answers to the user's prompts, now; sources: what was trained on what, for run.json.
    """

    settings: TrainSettings
    base: Path
    rows: Dataset
    recipe: Recipe
    data: Encoded
    evaluated: Encoded | None
    loaded: Loaded
    adapted: str
    measure: Measure
    samples: Callable[[], Sequence[Sample]]
    sources: Mapping[str, str]

    @property
    def steps(self) -> int:
        """How many there will be."""
        return steps_of(self.settings, len(self.data.examples))

    def loop(self, listener: Reporter, watch: Watch, start: int | None) -> Loop:
        """The loop, with its summary told. start: the step that it goes on from. Warns of what may not go as meant."""
        settings, loaded, measure, data, held = self.settings, self.loaded, self.measure, self.data, self.evaluated
        lines = summarise(settings, loaded, self.adapted, measure, self.rows, data, held, self.recipe, self.steps)
        if start is not None:
            lines.append(("goes on", f"after step {start:,}"))
        listener.started(lines, self.steps)
        rows = held.examples if held else []
        return Loop(loaded.model, data.examples, rows, measure, settings, listener, watch, self.samples)


def prepare(settings: TrainSettings) -> Prepared:
    """Read, load, inject. What starts by chance is drawn from the random states as they are.

    Raises LowrankError for whatever is wrong with the settings, the data or the model.
    """
    check_sinks(settings.log_to)
    device = device_of(settings)
    check_optimizer(settings.optimizer, device)
    attention_options(settings, device, dtype_of(settings, device))
    prompts = read_prompts(settings.sample_prompts)
    base = find_model(settings.model)
    dealt_out = is_dealt_out(settings, base)
    if not settings.full:
        lora_config(settings, ())  # what is wrong with it should be said before minutes of reading
    if settings.init_from is not None:
        open_adapter(settings.init_from, allow_pickle=False)  # so should what is wrong with that
    with processes.first_ahead():  # it fills the cache for all
        rows, held_out = read_rows(settings)
    check_kind(settings, rows)
    labels = labels_of(base, rows)
    whole = whole_of(settings, rows.kind) if dealt_out else None
    loaded = load(base, rows.kind, labels, settings, settings.modules_to_save, whole)
    recipe = recipe_of(settings, rows, labels, loaded)
    if held_out and processes.is_first():
        warn_of_met(rows, held_out)
    with processes.first_ahead():
        data = encode(rows, loaded.tokenizer, recipe)
        evaluated = encode(held_out, loaded.tokenizer, recipe) if held_out else None
    adapted = adapt(loaded, settings, base)
    processes.same_everywhere([p for p in loaded.model.parameters() if p.requires_grad])
    samples = Samples(loaded, recipe, prompts, settings.sample_tokens) if prompts else tuple
    reseed(settings.seed, processes.number())
    measure = loaded.measure(recipe, settings.metrics)
    if settings.lr == "auto":
        settings = settings.model_copy(update={"lr": auto_rate(loaded.model, settings.full)})
        adapted += f"; rate by {SOURCE}"
    if settings.pack:
        data, settings = packed(data, rows.kind, loaded, measure, recipe, settings)
    elif flattened(data.examples, rows.kind, loaded, measure, settings.micro_batch or settings.batch_size):
        measure = replace(measure, flat=True)
    sources = _sources(settings, base, rows, held_out)
    settings = settings.model_copy(update=sources | {"chat_date": recipe.date or settings.chat_date})
    return Prepared(settings, base, rows, recipe, data, evaluated, loaded, adapted, measure, samples, sources)


def inputs_of(settings: RunSettings) -> Inputs:
    """What a run reads, which nothing may be written to."""
    return {"base model": settings.model, "data": settings.data, "evaluation data": settings.eval_data}


def read_rows(settings: RunSettings) -> tuple[Dataset, Dataset | None]:
    """(rows to train on, rows to evaluate on: of --eval-data, held out, or the part of a folder that is for it)."""
    rows = read_dataset(settings.data, settings)
    held_out = None
    own = settings.data if has_part(settings.data, VALID) else None
    source = settings.eval_data or (None if settings.eval_split else own)
    if source is not None:
        of_kind = {"kind": rows.kind} if rows.kind == "regression" else {}  # whole numbers by themselves name classes
        held_out = read_dataset(source, settings.model_copy(update=of_kind), (VALID, TEST))
        if held_out.kind != rows.kind:
            raise DataError(
                f"--eval-data {held_out.path} has rows of kind {held_out.kind}, and --data {rows.path} of {rows.kind}"
            )
    if settings.eval_split:
        rows, held_out = split(rows, settings.eval_split, settings.seed)
    return rows, held_out and held_out.spread(settings.eval_rows)


def _sources(settings: TrainSettings, base: Path, rows: Dataset, held_out: Dataset | None) -> dict[str, str]:
    """What was trained on what, names on the Hub with the commit that was found for them."""
    found = {"model": pinned(settings.model, base), "data": pinned(settings.data, rows.file)}
    if settings.eval_data is not None and held_out is not None:
        found["eval_data"] = pinned(settings.eval_data, held_out.file)
    return found
