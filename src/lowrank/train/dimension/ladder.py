"""The ladder: full fine-tuning, frozen features and a subspace of every d, all to the same budget, for every seed."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.checkpoint.atomic import write_file
from lowrank.errors import CheckpointError, ConfigError, DataError
from lowrank.injection.config import LoraConfig
from lowrank.injection.planning import plan
from lowrank.train.dataset import Dataset, Kind
from lowrank.train.dimension.crossing import Crossing, crossing
from lowrank.train.dimension.settings import DimensionSettings
from lowrank.train.dimension.subspace import Subspace, check_dimension, owners
from lowrank.train.evaluation import Scores, score
from lowrank.train.loop import Loop, steps_of
from lowrank.train.models import find_model
from lowrank.train.names import read_targets
from lowrank.train.reporting import Reporter
from lowrank.train.task import Loaded, load
from lowrank.train.tokens import Encoded, encode
from lowrank.train.trainer import labels_of, read_rows, recipe_of, seeded

SETTINGS = "dimension-settings.json"
RESULT = "dimension.json"
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
class Measured:
    """weights: D; points: all of them; of_gain: per seed, where 90 % of the way from frozen to full is reached.

    of_score: per seed, where 90 % of full fine-tuning's accuracy is reached (Aghajanyan et al. 2020, §3), for
    classification only. None where full fine-tuning is not better than frozen features: then there is no d90.
    """

    weights: int
    metric: str
    points: tuple[Point, ...]
    of_gain: tuple[Crossing | None, ...]
    of_score: tuple[Crossing | None, ...]

    def as_json(self) -> dict[str, Any]:
        """Every number."""
        return asdict(self)


Told = Callable[[str, Point | None], None]


def measure_dimension(
    settings: DimensionSettings, told: Told = lambda _name, _point: None, reporter: Reporter | None = None
) -> Measured:
    """Run what is missing of the ladder, keep every point as it is finished, and say where d90 lies.

    Each training takes the same steps over the same batches. Adam moves each of n numbers by about the learning rate,
    and P keeps norms, so a rate of lr·√(D/n) moves θ equally far in all of them: that is the rate of each, with lr that
    of full fine-tuning. Where `rates` has several factors on it, each is tried and the best counts. Frozen features:
    only the head is trained, or, where there is none, nothing. Same settings, same bytes; a second start goes on where
    the first was stopped.

    told: called with a point's name before it is run, and with the point after it.

    Raises LowrankError for whatever is wrong with settings, data or model, before anything is trained.
    """
    base = find_model(settings.model)
    rows, held_out = _rows(settings)
    labels = labels_of(base, rows)
    _check_ladder(settings, load(base, rows.kind, labels, settings))
    folder = _claim(settings)
    points: list[Point] = []
    weights = 0
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for name in (FULL, FROZEN, *map(str, settings.ladder)):
            file = folder / f"point-{name}-seed{seed}.json"
            point = _kept(file)
            if point is None:
                told(f"{name}, seed {seed}", None)
                fresh = partial(
                    _run, base, rows, held_out, labels, settings.model_copy(update={"seed": seed}), reporter
                )
                point = max((fresh(name, rate) for rate in settings.rates), key=lambda point: point.score)
                write_file(file, (json.dumps(asdict(point), indent=2, allow_nan=False) + "\n").encode())
            told(f"{name}, seed {seed}", point)
            weights = point.trained if name == FULL else weights
            points.append(point)
    measured = _measured(settings, weights, "accuracy" if rows.kind == "classification" else "loss", points)
    write_file(folder / RESULT, (json.dumps(measured.as_json(), indent=2, allow_nan=False) + "\n").encode())
    return measured


def _run(
    base: Path,
    rows: Dataset,
    held_out: Dataset,
    labels: tuple[str, ...],
    settings: DimensionSettings,
    reporter: Reporter | None,
    name: str,
    rate: float,
) -> Point:
    """One training, of a model that is loaded for it, at `rate` times the rate of the rule."""
    with seeded(settings.seed):
        loaded = load(base, rows.kind, labels, settings)
        recipe = recipe_of(settings, rows, labels, loaded)
        data = encode(rows, loaded.tokenizer, recipe)
        evaluated = encode(held_out, loaded.tokenizer, recipe)
        scaled = settings.model_copy(update={"lr": settings.lr * rate})
        return _Run(loaded, rows.kind, scaled, data, evaluated, reporter).point(name)


def _rows(settings: DimensionSettings) -> tuple[Dataset, Dataset]:
    wanted = settings.model_copy(update={"eval_split": settings.share_held_out})
    rows, held_out = read_rows(wanted)
    if held_out is None or len(held_out.rows) < 2 or len(rows.rows) < settings.batch_size:
        found = len(held_out.rows) if held_out is not None else 0
        raise DataError(
            f"--data {settings.data}: {len(rows.rows)} rows to train on and {found} to measure on are too few; "
            f"at least {settings.batch_size} (a batch) and 2 are needed, so give more rows or a smaller --batch-size"
        )
    return rows, held_out


def _check_ladder(settings: DimensionSettings, loaded: Loaded) -> None:
    names = moving_names(loaded, settings)
    parameters = dict(loaded.model.named_parameters())
    scales = len(owners(names)) if settings.method == "said" else 0
    for d in settings.ladder:
        check_dimension(d, sum(parameters[name].numel() for name in names), scales)


def _claim(settings: DimensionSettings) -> Path:
    """The folder, which must hold nothing, or points of the same settings; more seeds and more d may come."""
    folder = Path(settings.out)
    own = settings.model_dump(mode="json", exclude={"out", "ladder", "seeds", "log_every", "eval_every"})
    file = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            then = json.loads(file.read_text(encoding="utf-8"))
            other = sorted(name for name in own.keys() | then.keys() if own.get(name) != then.get(name))
            if other:
                flags = ", ".join(f"--{name.replace('_', '-')} ({then.get(name)} then)" for name in other)
                raise ConfigError(f"--out {folder} holds points of other settings: {flags}; give another folder")
        elif any(folder.iterdir()):
            raise ConfigError(f"--out {folder} already holds files of something else; give another folder")
        else:
            write_file(file, (json.dumps(own, indent=2) + "\n").encode())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--out {folder}: cannot be used ({error})") from None
    return folder


def _kept(file: Path) -> Point | None:
    """The point of an earlier start."""
    if not file.exists():
        return None
    try:
        return Point(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        raise CheckpointError(f"{file} is not a point of this program; remove it, and it is run again") from None


def moving_names(loaded: Loaded, settings: DimensionSettings) -> list[str]:
    """The parameters that make up θ: all, or the targets' weights and the head."""
    model = loaded.model
    names = [name for name, _ in model.named_parameters()]
    if settings.over == "all":
        return names
    config = LoraConfig(target_modules=read_targets(settings.targets), modules_to_save=loaded.heads)
    done = plan(model, config)
    heads = tuple(f"{path}." for path in done.saved_modules)
    targets = {f"{entry.path}.weight" for entry in done.entries}
    return [name for name in names if name in targets or name.startswith(heads)]


@dataclass(frozen=True, slots=True)
class _Run:
    """One training of a freshly loaded model."""

    loaded: Loaded
    kind: Kind
    settings: DimensionSettings
    data: Encoded
    evaluated: Encoded
    reporter: Reporter | None

    def point(self, name: str) -> Point:
        """Train what the name says."""
        names = moving_names(self.loaded, self.settings)
        model = self.loaded.model
        parameters = dict(model.named_parameters())
        total = sum(parameters[moving].numel() for moving in names)
        if name == FULL:
            return self._trained(name, model, _only(model, set(names)), total)
        if name == FROZEN:
            heads = {n for n in parameters if n.startswith(tuple(f"{head}." for head in self.loaded.heads))}
            return self._trained(name, model, _only(model, heads), total)
        subspace = Subspace(model, names, int(name), self.settings.seed, self.settings.method == "said")
        return self._trained(name, subspace, int(name), total)

    def _trained(self, name: str, model: nn.Module, moving: int, total: int) -> Point:
        measure = self.loaded.measure(self.kind)
        held_out = self.evaluated.examples
        rate = self.settings.lr * math.sqrt(total / moving) if moving else 0.0
        if moving:
            steps = steps_of(self.settings, len(self.data.examples))
            settings = self.settings.model_copy(update={"lr": rate, "steps": steps, "eval_every": steps})
            Loop(model, self.data.examples, [], measure, settings, self.reporter or Reporter()).run()
        scores: Scores = score(model, held_out, measure, self.settings.micro_batch or self.settings.batch_size)
        best = scores.accuracy if self.kind == "classification" else -scores.loss
        if not math.isfinite(best):
            raise DataError(f"{name}, seed {self.settings.seed}: the loss is {scores.loss}; try a smaller --lr")
        return Point(name, self.settings.seed, moving, rate, scores.loss, scores.accuracy, best)


def _only(model: nn.Module, names: set[str]) -> int:
    """In place: train these parameters alone. Returns how many numbers they are."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _measured(settings: DimensionSettings, weights: int, metric: str, points: list[Point]) -> Measured:
    of_gain, of_score = [], []
    for full, frozen, curve in _by_seed(settings, points):
        better = full > frozen
        of_gain.append(crossing(curve, frozen + 0.9 * (full - frozen)) if better else None)
        of_score.append(crossing(curve, 0.9 * full) if better and metric == "accuracy" else None)
    return Measured(weights, metric, tuple(points), tuple(of_gain), tuple(of_score))


def _by_seed(settings: DimensionSettings, points: list[Point]) -> Iterator[tuple[float, float, dict[int, float]]]:
    for seed in range(settings.seed, settings.seed + settings.seeds):
        scores = {point.name: point.score for point in points if point.seed == seed}
        yield scores[FULL], scores[FROZEN], {d: scores[str(d)] for d in settings.ladder}
