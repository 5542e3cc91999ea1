"""One training of the ladder: all of θ, the head alone, or a subspace, from a model that is loaded for it."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lowrank.data.names import read_targets
from lowrank.data.recipe import Recipe
from lowrank.data.tokens import Encoded
from lowrank.errors import Diverged
from lowrank.injection.config import LoraConfig
from lowrank.injection.planning import plan
from lowrank.study.dimension.settings import DimensionSettings
from lowrank.study.dimension.subspace import Subspace
from lowrank.train.evaluation import Scores, score
from lowrank.train.loop import Loop, steps_of
from lowrank.train.reporting import Reporter
from lowrank.train.settings import LoopSettings, StepSettings
from lowrank.train.state.randomness import seeded
from lowrank.train.task import Loaded, load

FULL, FROZEN = "full", "frozen"


@dataclass(frozen=True, slots=True)
class Point:
    """One finished training. name: "full", "frozen" or the d; trained: how many numbers moved; lr: at its highest.

    score: the accuracy where rows are classified, and minus the loss where text is written; higher is better.
    """

    name: str
    seed: int
    trained: int
    lr: float
    loss: float
    accuracy: float
    score: float


@dataclass(frozen=True, slots=True)
class Task:
    """What every training of a ladder shares: the model's folder, and the rows as tokens."""

    base: Path
    recipe: Recipe
    data: Encoded
    evaluated: Encoded
    settings: DimensionSettings

    def point(self, name: str, seed: int, reporter: Reporter | None = None) -> Point:
        """Train what the name says with each of the rates, and keep the best.

        A rate at which the training diverges counts as lost. Raises Diverged where all do.
        """
        points, last = [], None
        for rate in self.settings.rates:
            try:
                points.append(self._run(name, seed, self.settings.rate * rate, reporter))
            except Diverged as error:
                last = error
        if not points:
            raise Diverged(f"{name}, seed {seed}: {last}; or let --rates try several, as in 0.1,1")
        return max(points, key=lambda point: point.score)

    def _run(self, name: str, seed: int, lr: float, reporter: Reporter | None) -> Point:
        with seeded(seed):
            loaded = load(self.base, self.recipe.kind, self.recipe.labels, self.settings)
            model, moving, total = self._moving(loaded, name, seed)
            rate = lr * math.sqrt(total / moving) if moving else 0.0
            measure = loaded.measure(self.recipe)
            if moving:
                how = self._loop_settings(rate, seed)
                Loop(model, self.data.examples, [], measure, how, reporter or Reporter()).run()
            size = self.settings.micro_batch or self.settings.batch_size
            scores: Scores = score(model, self.evaluated.examples, measure, size)
        accuracy = scores.figures["accuracy"]
        best = accuracy if self.recipe.kind == "classification" else -scores.loss
        if not math.isfinite(scores.loss):
            raise Diverged(f"the loss after training is {scores.loss}; try a smaller --lr")
        return Point(name, seed, moving, rate, scores.loss, accuracy, best)

    def _moving(self, loaded: Loaded, name: str, seed: int) -> tuple[nn.Module, int, int]:
        """(what is trained, how many numbers of it move, how many θ has)."""
        names, model = moving_names(loaded, self.settings), loaded.model
        parameters = dict(model.named_parameters())
        total = sum(parameters[moving].numel() for moving in names)
        if name == FULL:
            return model, _only(model, set(names)), total
        if name == FROZEN:
            heads = {n for n in parameters if n.startswith(tuple(f"{head}." for head in loaded.heads))}
            return model, _only(model, heads), total
        return Subspace(model, names, int(name), seed, self.settings.method == "said"), int(name), total

    def _loop_settings(self, rate: float, seed: int) -> LoopSettings:
        shared = {name: getattr(self.settings, name) for name in StepSettings.model_fields}
        steps = steps_of(self.settings, len(self.data.examples))
        return LoopSettings.model_validate({**shared, "lr": rate, "seed": seed, "steps": steps, "eval_every": steps})


def moving_names(loaded: Loaded, settings: DimensionSettings) -> list[str]:
    """The parameters that make up θ: all, or the targets' weights and the head."""
    model = loaded.model
    names = [name for name, _ in model.named_parameters()]
    if settings.over == "all":
        return names
    config = LoraConfig(target_modules=read_targets(settings.targets), modules_to_save=loaded.heads)
    done = plan(model, config)
    heads = tuple(f"{path}." for path in done.saved_modules)
    targets = {entry.path if entry.experts else f"{entry.path}.weight" for entry in done.entries}
    return [name for name in names if name in targets or name.startswith(heads)]


def _only(model: nn.Module, names: set[str]) -> int:
    """In place: train these parameters alone. Returns how many numbers they are."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
