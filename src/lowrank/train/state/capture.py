"""From a loop to its run's value, and back into a loop that was made anew."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError, short, some
from lowrank.layers.base import PREFIX
from lowrank.train import processes
from lowrank.train.adamw import Entry, fresh, written
from lowrank.train.evaluation import Scores
from lowrank.train.loop import Loop
from lowrank.train.loop_state import Interval, LoopState
from lowrank.train.state.forward import ForwardState
from lowrank.train.state.randomness import draw_on, drawn, reseed
from lowrank.train.state.value import (
    About,
    EvaluationFacts,
    Facts,
    IntervalFacts,
    LogFacts,
    Number,
    RandomFacts,
    RunValue,
)

Tensors = dict[str, Tensor]


def capture(loop: Loop, forward: ForwardState, about: About, log: LogFacts) -> RunValue:
    """All that the steps so far have changed. The tensors are the loop's own: write them before the next step."""
    state, names = loop.state, trained_names(loop.model)
    random, facts = drawn(next(loop.model.parameters()).device)
    first, *others = processes.gathered_tensors(random)
    averages, numbers = _optimiser(state, names)
    tensors = {
        **_under("weights", dict(zip(names, state.optimiser.parameters, strict=True))),
        **_under("kept", _kept(loop.model)),
        **_under("masters", _masters(state, names)),
        **_under("best", dict(zip(names, state.best_weights or [], strict=state.best_weights is not None))),
        **_under("optimiser", averages),
        **_under("buffers", forward.buffers()),
        **_under("random", first),
        **{name: t for n, found in enumerate(others, 1) for name, t in _under(f"random-{n}", found).items()},
    }
    interval = state.interval
    return RunValue(
        tensors,
        Facts(
            step=state.step,
            trained=state.trained,
            tokens=state.tokens,
            place=loop.place,
            halvings=state.halvings,
            interval=IntervalFacts(
                total=interval.total, trained=interval.trained, tokens=interval.tokens, seconds=interval.seconds
            ),
            evaluations=[
                EvaluationFacts(step=step, loss=scores.loss, count=scores.count, figures=dict(scores.figures))
                for step, scores in state.evaluations
            ],
            random=[RandomFacts.model_validate_json(one) for one in processes.gathered(facts.model_dump_json())],
            numbers=forward.numbers(),
            optimiser=numbers,
            log=log,
            about=about,
        ),
    )


@torch.no_grad()
def restore(loop: Loop, forward: ForwardState, value: RunValue) -> None:
    """In place: the loop is where the value's was.

    Of several processes each draws on from its own random states.

    Raises CheckpointError where the tensors are not those of this loop's model.
    """
    facts, state, names = value.facts, loop.state, trained_names(loop.model)
    own = dict(zip(names, state.optimiser.parameters, strict=True))
    _copy(own, _those("weights", value.tensors), "trained")
    _copy(_kept(loop.model), _those("kept", value.tensors), "held")
    _copy(_masters(state, names), _those("masters", value.tensors), "trained in float32")
    best = _those("best", value.tensors)
    state.best_weights = [torch.empty_like(parameter) for parameter in own.values()] if best else None
    if state.best_weights is not None:
        _copy(dict(zip(names, state.best_weights, strict=True)), best, "best")
    _restore_optimiser(state, names, _those("optimiser", value.tensors), facts.optimiser)
    forward.restore(_those("buffers", value.tensors), facts.numbers)
    state.step, state.trained, state.tokens, state.halvings = facts.step, facts.trained, facts.tokens, facts.halvings
    state.interval = Interval(**facts.interval.model_dump())
    state.evaluations = [(found.step, Scores(found.loss, found.count, found.figures)) for found in facts.evaluations]
    if loop.place != facts.place:
        raise CheckpointError(
            f"step {facts.step} was at batch {facts.place[1]} of epoch {facts.place[0]}, and of these rows it would be "
            f"at batch {loop.place[1]} of epoch {loop.place[0]}: the data is not that of the run"
        )
    if not facts.random or "random.torch" not in value.tensors:
        raise CheckpointError("the checkpoint has no random states")
    number = processes.number()
    if number >= len(facts.random):  # more processes than there were
        reseed(loop.settings.seed + facts.step, number)
        return
    where = _those(f"random-{number}" if number else "random", value.tensors)
    draw_on(next(loop.model.parameters()).device, where, facts.random[number])


def trained_names(model: nn.Module) -> list[str]:
    """The names of what is trained, in the optimiser's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _kept(model: nn.Module) -> Tensors:
    """What adapters hold and do not train: where PiSSA and OLoRA started. Another machine would make other ones."""
    found = model.named_parameters()
    return {name: p for name, p in found if not p.requires_grad and f".{PREFIX}" in f".{name}"}


def _masters(state: LoopState, names: list[str]) -> Tensors:
    pairs = zip(names, state.optimiser.parameters, state.optimiser.masters, strict=True)
    return {name: master for name, parameter, master in pairs if master is not parameter}


def _optimiser(state: LoopState, names: list[str]) -> tuple[Tensors, dict[str, Number]]:
    """({KEY.NAME: tensor}, {KEY.NAME: number}) of all that the optimiser remembers of each trained tensor."""
    tensors: Tensors = {}
    numbers: dict[str, Number] = {}
    for name, master in zip(names, state.optimiser.masters, strict=True):
        for key, value in written(state.optimiser.adamw.state.get(master, {})).items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{key}.{name}"] = value
    return tensors, numbers


def _restore_optimiser(state: LoopState, names: list[str], tensors: Tensors, numbers: Mapping[str, Number]) -> None:
    """In place. `load_state_dict` would turn every tensor to its parameter's dtype.

    Raises CheckpointError for entries of another kind than this optimiser has of a tensor, and where some are missing.
    """
    adamw, masters = state.optimiser.adamw, dict(zip(names, state.optimiser.masters, strict=True))
    found: dict[str, Entry] = {}
    for where, value in (tensors | dict(numbers)).items():
        key, _, name = where.partition(".")
        if name not in masters:
            raise CheckpointError(f"the optimiser's {short(repr(where), 80)} is of nothing that is trained here")
        found.setdefault(name, {})[key] = value
    adamw.state.clear()
    for name, entry in found.items():
        adamw.state[masters[name]] = _entry(name, entry, fresh(adamw, masters[name]))


def _entry(name: str, found: Entry, own: Entry) -> Entry:
    """What was found of one tensor, in the places of `own`."""
    if missing := written(own).keys() - found.keys():
        raise CheckpointError(f"the checkpoint lacks {some(sorted(missing))} of {name}")
    for key, value in written(own).items():
        there, wanted = _kind(found[key]), _kind(value)
        if there != wanted:
            raise CheckpointError(
                f"the optimiser's {short(f'{key}.{name}', 80)} is {there} in the checkpoint, and of this tensor it "
                f"would be {wanted}"
            )
        own[key] = found[key].to(value.device) if isinstance(value, Tensor) else found[key]
    return own


def _kind(value: Tensor | Number) -> str:
    """In words; of one number, the dtype does not matter."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)}" + (f" of {value.dtype}" if value.dim() else "")


def _under(group: str, tensors: Tensors) -> Tensors:
    return {f"{group}.{name}": tensor for name, tensor in tensors.items()}


def _those(group: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(f"{group}."): t for name, t in tensors.items() if name.startswith(f"{group}.")}


def _copy(own: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    """In place. Raises CheckpointError unless names, shapes and dtypes are the same."""
    if strange := own.keys() ^ found.keys():
        raise CheckpointError(f"the tensors that are {what} differ from the checkpoint's in {some(sorted(strange))}")
    for name, tensor in own.items():
        there: Any = found[name]
        if tensor.shape != there.shape or tensor.dtype != there.dtype:
            raise CheckpointError(
                f"{name} is {tuple(there.shape)} of {there.dtype} in the checkpoint, and here {tuple(tensor.shape)} of "
                f"{tensor.dtype}"
            )
        tensor.copy_(there)
