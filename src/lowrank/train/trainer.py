"""One run from settings to a saved adapter: check, read, load, inject, train, save."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.checkpoint import save_adapter
from lowrank.checkpoint.outputs import Check, check_room, claimed
from lowrank.data.prompts import prompt_files
from lowrank.data.recipe import FILE
from lowrank.errors import ConfigError, Diverged, LowrankError
from lowrank.train import processes
from lowrank.train.loftq import save_moved
from lowrank.train.loop import Loop
from lowrank.train.loop_state import LoopState
from lowrank.train.places import Places
from lowrank.train.preparing import inputs_of, prepare
from lowrank.train.reporting import Log, Reporter, Several
from lowrank.train.result import TrainResult, finished, record, result_of
from lowrank.train.run_folder import LOG, begin, complete, finish, new_run, save_whole, settle, write_settings
from lowrank.train.settings import TrainSettings
from lowrank.train.sinks.sink import opened
from lowrank.train.state.forward import ForwardState
from lowrank.train.state.identity import made_of
from lowrank.train.state.keeper import Keeper
from lowrank.train.state.randomness import seeded
from lowrank.train.state.resume import about, check_same, check_settings, settings_of
from lowrank.train.state.settings import seconds_of
from lowrank.train.state.stopping import Stop
from lowrank.train.state.store import latest
from lowrank.train.state.value import RunValue
from lowrank.train.task import Loaded
from lowrank.train.views.card import NAME as CARD
from lowrank.train.views.card import card
from lowrank.train.views.run_log import losses_of


def run(settings: TrainSettings, reporter: Reporter | None = None) -> TrainResult:
    """Train an adapter (or, with `full`, every weight) and save it into the new folder `settings.out`.

    Same settings on the same machine give the same bytes. torch's random state is put back afterwards. Where torchrun
    started several processes, they share every step's rows, and the first one writes and reports.

    Raises LowrankError, before anything is written, for whatever is wrong with the settings, the data or the model; and
    while training where the loss stops being finite or the memory does not suffice.
    """
    began = time.monotonic()
    with processes.joined(settings.device), _claimed(settings, new_run) as folder:
        return _run(settings, folder, reporter or Reporter(), began)


def resume(folder: str | Path, reporter: Reporter | None = None, **changes: Any) -> TrainResult:
    """Go on with the run in a folder from its last checkpoint, or from its beginning where it came to none.

    The result has the bytes of a run that was never stopped. changes: settings by name, those that change no number of
    a step (`state.resume` names them). A run that is complete is left as it is.

    Raises LowrankError as `run` does, and for settings, a base, data or a tokenizer that are not the run's.
    """
    began = time.monotonic()
    settings = settings_of(Path(folder), changes)
    with processes.joined(settings.device), _claimed(settings, finish) as place:
        if (result := finished(place, settings)) is not None:
            settle(place, settings)
            return replace(result, folder=Path(folder))
        value = latest(place)
        if value is None and (place / FILE).exists():
            raise ConfigError(
                f"--resume {folder}: the run is complete and its checkpoints are gone, so it cannot take more steps; "
                "they stay where --keep-checkpoints says so"
            )
        if value is not None:
            check_settings(value.facts.about, settings)
        return _run(settings, place, reporter or Reporter(), began, value)


def _run(
    settings: TrainSettings, folder: Path, reporter: Reporter, began: float, value: RunValue | None = None
) -> TrainResult:
    """value: where to go on from; from the beginning where there is none."""
    with seeded(settings.seed), ExitStack() as until_the_end:
        found = prepare(settings)
        settings, loaded = found.settings, found.loaded
        made = made_of(found.base, settings, loaded.tokenizer, found.data.examples)
        now = about(settings, found.steps, made, loaded)
        if value is not None:
            check_same(settings.out, value.facts.about, now, value.facts.step)
        if processes.is_first():
            _check_room(loaded.model, folder, settings.full)
            if value is None:
                begin(folder, settings.resolved())
        log = Log(folder / LOG)
        stop = Stop(began + seconds_of(settings.stop_after) if settings.stop_after else None, reporter.stopping)
        places = Places(found.rows, found.data, loaded.tokenizer, found.recipe)
        keeper = Keeper(folder, settings.out, settings, now, log, stop, ForwardState(loaded.model), places)
        start = None if value is None else value.facts.step
        listener = Reporter()
        if processes.is_first():
            sinks = until_the_end.enter_context(opened(settings.log_to, folder, settings.resolved(), start))
            listener = Several(log, reporter, *sinks)
        loop = found.loop(listener, keeper, start)
        if value is not None:
            keeper.go_on(loop, value)
            if processes.is_first():
                write_settings(folder, settings.resolved())
        state = _train(loop, keeper, loaded.device)
    if processes.is_first():
        said = record(found.recipe, state, loaded, len(found.data.examples)) | dict(found.sources)
        told = {} if settings.full else {CARD: card(settings, said, made, losses_of(str(folder)))}
        complete(folder, said, lambda place: _save(loaded, settings, place), told)
        settle(folder, settings)
    processes.wait()
    return result_of(Path(settings.out), state)


@contextmanager
def _claimed(settings: TrainSettings, check: Check) -> Iterator[Path]:
    """The folder of the run, which the first process claims for all."""
    if not processes.is_first():
        processes.wait()
        yield Path(os.path.realpath(settings.out))
        return
    inputs = {**inputs_of(settings), "adapter": settings.init_from} | prompt_files(settings.sample_prompts)
    with claimed(settings.out, inputs, check) as folder:
        processes.wait()
        yield folder


def _check_room(model: nn.Module, folder: Path, full: bool) -> None:
    """Better said before hours of training than after. A full disk at the end is another matter, see `complete`."""
    saved = [p for p in model.parameters() if full or p.requires_grad]
    check_room(folder, sum(p.numel() * p.element_size() for p in saved))


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
        save_moved(loaded.model, folder)
