"""One run from settings to a saved adapter: check, read, load, inject, train, save."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.checkpoint import save_adapter
from lowrank.checkpoint.outputs import Inputs, check_room, claimed
from lowrank.data.dataset import Dataset, read_dataset, split
from lowrank.data.sources import TEST, VALID, has_part
from lowrank.data.tokens import encode
from lowrank.errors import ConfigError, DataError, Diverged, LowrankError
from lowrank.hub import pinned
from lowrank.train.adapting import adapt, lora_config, watcher
from lowrank.train.asked import check_kind
from lowrank.train.loftq import LOFTQ, LoftqStarts
from lowrank.train.loop import Loop, steps_of
from lowrank.train.loop_state import LoopState
from lowrank.train.models import find_model
from lowrank.train.packing import packed
from lowrank.train.places import Places
from lowrank.train.recipes import labels_of, recipe_of
from lowrank.train.reporting import Log, Reporter, Several
from lowrank.train.result import TrainResult, finished, record, result_of
from lowrank.train.run_folder import LOG, begin, complete, finish, new_run, save_whole, settle, write_settings
from lowrank.train.settings import RunSettings, TrainSettings
from lowrank.train.state.forward import ForwardState
from lowrank.train.state.identity import made_of
from lowrank.train.state.keeper import Keeper
from lowrank.train.state.randomness import seeded
from lowrank.train.state.resume import about, check_same, settings_of
from lowrank.train.state.settings import seconds_of
from lowrank.train.state.stopping import Stop
from lowrank.train.state.store import latest
from lowrank.train.state.value import RunValue
from lowrank.train.summary import summarise
from lowrank.train.task import Loaded, load

LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how launchers say how many processes there are


def run(settings: TrainSettings, reporter: Reporter | None = None) -> TrainResult:
    """Train an adapter (or, with `full`, every weight) and save it into the new folder `settings.out`.

    Same settings on the same machine give the same bytes. torch's random state is put back afterwards.

    Raises LowrankError, before anything is written, for whatever is wrong with the settings, the data or the model; and
    while training where the loss stops being finite or the memory does not suffice.
    """
    check_alone()
    began = time.monotonic()
    with claimed(settings.out, inputs_of(settings), new_run) as folder:
        return _run(settings, folder, reporter or Reporter(), began)


def resume(folder: str | Path, reporter: Reporter | None = None, **changes: Any) -> TrainResult:
    """Go on with the run in a folder from its last checkpoint, or from its beginning where it came to none.

    The result has the bytes of a run that was never stopped. changes: settings by name, those that change no number of
    a step (`state.resume` names them). A run that is complete is left as it is.

    Raises LowrankError as `run` does, and for settings, a base, data or a tokenizer that are not the run's.
    """
    check_alone()
    began = time.monotonic()
    settings = settings_of(Path(folder), changes)
    with claimed(settings.out, inputs_of(settings), finish) as place:
        if (result := finished(place, settings)) is not None:
            settle(place, settings)
            return replace(result, folder=Path(folder))
        return _run(settings, place, reporter or Reporter(), began, latest(place))


def _run(
    settings: TrainSettings, folder: Path, reporter: Reporter, began: float, value: RunValue | None = None
) -> TrainResult:
    """value: where to go on from; from the beginning where there is none."""
    base = find_model(settings.model)
    if not settings.full:
        lora_config(settings, ())  # what is wrong with it should be said before minutes of reading
    rows, held_out = read_rows(settings)
    check_kind(settings, rows)
    labels = labels_of(base, rows)
    with seeded(settings.seed):
        starts = LoftqStarts() if settings.init == LOFTQ else None
        loaded = load(base, rows.kind, labels, settings, settings.modules_to_save, watcher(settings, starts))
        recipe = recipe_of(settings, rows, labels, loaded)
        data = encode(rows, loaded.tokenizer, recipe)
        evaluated = encode(held_out, loaded.tokenizer, recipe) if held_out else None
        adapted = adapt(loaded, settings, starts)
        measure = loaded.measure(recipe, settings.metrics)
        if settings.pack:
            data, settings = packed(data, rows.kind, loaded, measure, recipe, settings)
        sources = _sources(settings, base, rows, held_out)
        settings = settings.model_copy(update=sources)
        steps = steps_of(settings, len(data.examples))
        now = about(settings, steps, made_of(base, settings, loaded.tokenizer, data.examples), loaded.device)
        if value is not None:
            check_same(folder, value.facts.about, now, value.facts.step)
        _check_room(loaded.model, folder, settings.full)
        begin(folder, settings.resolved()) if value is None else write_settings(folder, settings.resolved())
        log = Log(folder / LOG)
        listener = Several(log, reporter)
        listener.started(summarise(settings, loaded, adapted, measure, rows, data, evaluated, recipe, steps), steps)
        stop = Stop(began + seconds_of(settings.stop_after) if settings.stop_after else None, reporter.stopping)
        places = Places(rows, data, loaded.tokenizer, recipe)
        keeper = Keeper(folder, settings.out, settings, now, log, stop, ForwardState(loaded.model), places)
        held = evaluated.examples if evaluated else []
        loop = Loop(loaded.model, data.examples, held, measure, settings, listener, keeper)
        if value is not None:
            keeper.go_on(loop, value)
        state = _train(loop, keeper, loaded.device)
    found = record(recipe, state, loaded, len(data.examples))
    complete(folder, found | sources, lambda place: _save(loaded, settings, place))
    settle(folder, settings)
    return result_of(Path(settings.out), state)


def check_alone() -> None:
    """Raise ConfigError in a process that a launcher started as one of several: each would train the same adapter."""
    for name in LAUNCHED:
        if (count := os.environ.get(name, "")).isdigit() and int(count) > 1:
            raise ConfigError(
                f"{name} is {count}: a training is one process as yet, and a launcher (torchrun, mpirun) started "
                f"{count}; start it without one"
            )


def inputs_of(settings: RunSettings) -> Inputs:
    """What a run reads, which nothing may be written to."""
    return {"base model": settings.model, "data": settings.data, "evaluation data": settings.eval_data}


def _check_room(model: nn.Module, folder: Path, full: bool) -> None:
    """Better said before hours of training than after. A full disk at the end is another matter, see `complete`."""
    saved = [p for p in model.parameters() if full or p.requires_grad]
    check_room(folder, sum(p.numel() * p.element_size() for p in saved))


def _sources(settings: TrainSettings, base: Path, rows: Dataset, held_out: Dataset | None) -> dict[str, str]:
    """What was trained on what, names on the Hub with the commit that was found for them."""
    found = {"model": pinned(settings.model, base), "data": pinned(settings.data, rows.path)}
    if settings.eval_data is not None and held_out is not None:
        found["eval_data"] = pinned(settings.eval_data, held_out.path)
    return found


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


def _train(loop: Loop, keeper: Keeper, device: torch.device) -> LoopState:
    """Until all steps are taken; from the last checkpoint again, where the training diverged and that is asked for."""
    try:
        with keeper.stop.listening():
            while True:
                try:
                    return loop.run()
                except Diverged as error:
                    if not keeper.goes_back(loop, error):
                        raise
    except torch.OutOfMemoryError:
        raise LowrankError(
            f"step {loop.state.step + 1}: the memory of {device} does not suffice; try a smaller --micro-batch "
            "(same result), --gradient-checkpointing (same result), or a smaller --max-length"
        ) from None


def _save(loaded: Loaded, settings: TrainSettings, folder: Path) -> None:
    if settings.full:
        save_whole(loaded.model, loaded.tokenizer, folder)
    else:
        save_adapter(loaded.model, folder)
