"""The spectrum of the loss's gradient for every target, before anything is trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.proposal import ModuleSpectrum
from lowrank.core.finite import named
from lowrank.core.sketch import Directions, Sketch
from lowrank.data.batches import chunks
from lowrank.data.dataset import read_dataset
from lowrank.data.tokens import Example, encode
from lowrank.errors import LowrankError
from lowrank.injection.plan import InjectionPlan, PlanEntry
from lowrank.injection.planning import plan
from lowrank.injection.quantise import require_plain
from lowrank.injection.traversal import base_modules
from lowrank.study.rank.settings import GradientRankSettings
from lowrank.train.adapting import target_config
from lowrank.train.evaluation import Measure
from lowrank.train.models import find_model
from lowrank.train.recipes import labels_of, recipe_of
from lowrank.train.state.randomness import seeded
from lowrank.train.task import load

Progress = Callable[[int, int], None]  # (rows done, rows in all)


@dataclass(frozen=True, slots=True)
class Gradients:
    """modules: the spectrum of ∂L/∂W0 of every target, L the mean loss; rows, trained: what L is the mean over.

    new_head: the classifier's head started from random numbers, so the gradient is seen through a head that knows
    nothing; warnings: what the plan of the targets warns of.
    """

    modules: tuple[ModuleSpectrum, ...]
    rows: int
    trained: int
    new_head: bool
    warnings: tuple[str, ...]


def gradient_spectra(settings: GradientRankSettings, progress: Progress = lambda _done, _count: None) -> Gradients:
    """The first `most` singular values of every target's gradient, over a few rows, the model as it is.

    Backward hands over one weight's gradient at a time; it goes into a sketch and is dropped. Where a sketch would be
    about as large as the matrix, the sum of the gradients is kept instead, and measured exactly. Same settings, same
    figures.

    Raises LowrankError for whatever is wrong with settings, data or model, and for a gradient that is not finite.
    """
    base = find_model(settings.model)
    data = read_dataset(settings.data, settings)
    labels = labels_of(base, data)
    with seeded(settings.seed):
        loaded = load(base, data.kind, labels, settings)
        require_plain(loaded.model, "rank from gradients")
        planned = plan(loaded.model, target_config(settings))
        recipe = recipe_of(settings, data, labels, loaded)
        few = encode(data.spread(settings.sample), loaded.tokenizer, recipe)
    directions = Directions(settings.most, settings.seed, loaded.device)
    sketches = measured(loaded.model, planned, directions, few.examples, loaded.measure(recipe), settings, progress)
    return Gradients(
        tuple(_spectrum(entry, sketches[entry.path], settings.most) for entry in planned.entries),
        len(few.examples),
        few.trained,
        bool(loaded.fresh),
        planned.warnings,
    )


def measured(
    model: nn.Module,
    planned: InjectionPlan,
    directions: Directions,
    examples: Sequence[Example],
    measure: Measure,
    settings: GradientRankSettings,
    progress: Progress,
) -> dict[str, list[Sketch]]:
    """{path: a sketch of every part, of every expert} of the gradient of the mean loss over all examples."""
    sketches = {entry.path: empty_sketches(entry, directions) for entry in planned.entries}
    count = measure.count(examples)
    model.eval()  # without dropout, so that the gradient is that of the loss and not of one of its samples
    with watched(model, planned.entries, sketches):
        done = 0
        for part in chunks(examples, settings.batch_size):
            torch.autograd.backward(measure.loss(model, measure.collate(part)).total / count)
            done += len(part)
            progress(done, len(examples))
    return sketches


def empty_sketches(entry: PlanEntry, directions: Directions) -> list[Sketch]:
    """One for every matrix of the target that gets factors of its own, in the order of `_matrices`."""
    return [Sketch(rows, entry.k, directions) for _ in range(entry.experts or 1) for rows in entry.rows]


def _matrices(entry: PlanEntry, weight: Tensor) -> Iterator[Tensor]:
    """The matrices (d_i, k) that get factors of their own, of a tensor like the target's: its parts, its experts."""
    for one in weight.unbind() if entry.experts else (weight,):
        matrix = entry.kind.matrix(one)
        for part in entry.parts or (None,):
            yield matrix if part is None else matrix[part.indices().to(matrix.device)]


@contextmanager
def watched(model: nn.Module, entries: tuple[PlanEntry, ...], sketches: dict[str, list[Sketch]]) -> Iterator[None]:
    """Inside, every target's gradient goes into its sketches and is dropped, and no other weight has one."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = []
    try:
        model.requires_grad_(False)
        for weight, targets in _by_weight(model, entries):
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(_taker(targets, sketches)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _by_weight(model: nn.Module, entries: tuple[PlanEntry, ...]) -> list[tuple[Tensor, list[PlanEntry]]]:
    """Every weight once, with the targets it belongs to: tied ones share it, and its gradient is that of them all."""
    found: dict[int, tuple[Tensor, list[PlanEntry]]] = {}
    modules = dict(base_modules(model))
    for entry in entries:
        module: Any = modules[entry.path]
        found.setdefault(id(module.weight), (module.weight, []))[1].append(entry)
    return list(found.values())


def _taker(targets: list[PlanEntry], sketches: dict[str, list[Sketch]]) -> Callable[[Tensor], None]:
    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        for entry in targets:
            if not weight.grad.isfinite().all():
                raise LowrankError(
                    f"{entry.path}: the gradient is not finite, so it has no spectrum; is the model sound, and its "
                    "dtype wide enough? try --dtype float32"
                )
            for gradient, sketch in zip(_matrices(entry, weight.grad), sketches[entry.path], strict=True):
                sketch.add(gradient)
        weight.grad = None

    return take


def _spectrum(entry: PlanEntry, sketches: list[Sketch], most: int) -> ModuleSpectrum:
    """Of the parts of a fused projection, or a stack's experts, together: rank n gives each its n-th direction."""
    with named(entry.path):
        spectra = [sketch.spectrum() for sketch in sketches]
    squares = torch.zeros(min(most, *entry.rows, entry.k), dtype=torch.float64)
    for spectrum in spectra:
        squares += spectrum.sigma[: len(squares)].square()
    return ModuleSpectrum(
        path=entry.path,
        shape=(entry.d, entry.k),
        cost=entry.parameters // entry.rank,
        squares=tuple(squares.tolist()),
        total=sum(spectrum.total for spectrum in spectra),
        scale=entry.scale,
        exact=all(spectrum.exact for spectrum in spectra),
        experts=entry.experts,
    )
