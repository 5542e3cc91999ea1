"""The ladder: full fine-tuning, frozen features and a subspace of every d, all to the same budget, for every seed."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank.checkpoint.atomic import write_file
from lowrank.checkpoint.outputs import Check, claimed, new_folder
from lowrank.data.dataset import Dataset
from lowrank.data.rows import PER_TOKEN
from lowrank.data.tokens import encode
from lowrank.errors import CheckpointError, ConfigError, DataError, Diverged, LowrankWarning
from lowrank.files.json_file import read_object
from lowrank.injection.quantise import require_plain
from lowrank.stages import under
from lowrank.study.dimension.crossing import Crossing, crossing
from lowrank.study.dimension.settings import DimensionSettings
from lowrank.study.dimension.subspace import check_dimension, owners
from lowrank.study.dimension.training import FROZEN, FULL, Point, Task, moving_names
from lowrank.train.models import find_model
from lowrank.train.preparing import inputs_of, read_rows
from lowrank.train.recipes import labels_of, recipe_of
from lowrank.train.reporting import Reporter
from lowrank.train.task import Loaded, load

SETTINGS = "dimension-settings.json"
RESULT = "dimension.json"


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
    settings: DimensionSettings,
    told: Told = lambda _name, _point: None,
    reporter: Reporter | None = None,
    finish: Callable[[Measured, Path], None] = lambda _measured, _folder: None,
) -> Measured:
    """Run what is missing of the ladder, keep every point as it is finished, and say where d90 lies.

    Each training takes the same steps over the same batches. Adam moves each of n numbers by about the learning rate,
    and P keeps norms, so a rate of lr·√(D/n) moves θ equally far in all of them: that is the rate of each, with lr that
    of full fine-tuning. Where `rates` has several factors on it, each is tried and the best counts. Frozen features:
    only the head is trained, or, where there is none, nothing. Same settings, same bytes; a second start goes on where
    the first was stopped.

    told: called with a point's name before it is run, and with the point after it; finish: called with what was
    measured and its folder, which nobody else writes to meanwhile.

    Raises LowrankError for whatever is wrong with settings, data or model, before anything is trained.
    """
    with claimed(settings.out, inputs_of(settings), _same_settings(settings)) as folder:
        task = _task(settings)
        _begin(folder, settings)
        points = list(_points(settings, folder, task, told, reporter or Reporter()))
        if all(point.name in (FULL, FROZEN) for point in points):
            raise Diverged(f"--out {folder}: no point of the ladder was finished, so there is no curve")
        weights = next(point.trained for point in points if point.name == FULL)
        metric = "accuracy" if task.recipe.kind == "classification" else "loss"
        measured = summarised(settings, weights, metric, points)
        write_file(folder / RESULT, (json.dumps(measured.as_json(), indent=2, allow_nan=False) + "\n").encode())
        finish(measured, folder)
    return measured


def _points(settings: DimensionSettings, folder: Path, task: Task, told: Told, reporter: Reporter) -> Iterator[Point]:
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for name in (FULL, FROZEN, *map(str, settings.ladder)):
            file = folder / f"point-{name}-seed{seed}.json"
            point = _kept(file)
            if point is None:
                told(f"{name}, seed {seed}", None)
                with under(f"{name}, seed {seed}"):
                    point = _tried(task, name, seed, reporter)
                if point is None:
                    continue
                write_file(file, (json.dumps(asdict(point), indent=2, allow_nan=False) + "\n").encode())
            told(f"{name}, seed {seed}", point)
            yield point


def _tried(task: Task, name: str, seed: int, reporter: Reporter) -> Point | None:
    """The point; None, with a warning, for a d at which every rate diverges: the curve has its other points."""
    try:
        return task.point(name, seed, reporter)
    except Diverged as error:
        if name in (FULL, FROZEN):  # without these two there is no curve
            raise
        warnings.warn(f"{error}; left out of the curve", LowrankWarning, 2)
        return None


def _task(settings: DimensionSettings) -> Task:
    """The rows as tokens, once for all trainings; a ladder that cannot be is refused here."""
    base = find_model(settings.model)
    rows, held_out = _rows(settings)
    loaded = load(base, rows.kind, labels := labels_of(base, rows), settings)
    require_plain(loaded.model, "dimension")
    _check_ladder(settings, loaded)
    recipe = recipe_of(settings, rows, labels, loaded)
    data, evaluated = (encode(part, loaded.tokenizer, recipe) for part in (rows, held_out))
    return Task(base, recipe, data, evaluated, settings)


def _rows(settings: DimensionSettings) -> tuple[Dataset, Dataset]:
    wanted = settings.model_copy(update={"eval_split": settings.share_held_out})
    rows, held_out = read_rows(wanted)
    if rows.kind not in ("classification", *PER_TOKEN):
        raise ConfigError(
            f"{rows.path}: the dimension of rows of {rows.kind} is not measured, which have no accuracy "
            "or no model to be compared with; give rows to classify or to write"
        )
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


def _own(settings: DimensionSettings) -> dict[str, Any]:
    """What all points of a folder have in common; more seeds and more d may come."""
    return settings.model_dump(mode="json", exclude={"out", "ladder", "seeds"})


def _same_settings(settings: DimensionSettings) -> Check:
    """The folder must hold nothing, or points of the same settings."""

    def check(folder: Path) -> None:
        file = folder / SETTINGS
        if not file.exists():
            new_folder(folder)
            return
        try:
            then, own = read_object(file, "give another folder"), _own(settings)
            other = sorted(name for name in own.keys() | then.keys() if own.get(name) != then.get(name))
        except OSError as error:
            raise CheckpointError(f"--out {folder}: cannot be used ({error})") from None
        if other:
            flags = ", ".join(f"--{name.replace('_', '-')} ({then.get(name)} then)" for name in other)
            raise ConfigError(f"--out {folder} holds points of other settings: {flags}; give another folder")

    return check


def _begin(folder: Path, settings: DimensionSettings) -> None:
    folder.mkdir(exist_ok=True)
    if not (folder / SETTINGS).exists():
        write_file(folder / SETTINGS, (json.dumps(_own(settings), indent=2) + "\n").encode())


def _kept(file: Path) -> Point | None:
    """The point of an earlier start."""
    if not file.exists():
        return None
    try:
        return Point(**read_object(file, "remove it"))
    except (CheckpointError, TypeError, OSError):
        raise CheckpointError(f"{file} is not a point of this program; remove it, and it is run again") from None


def summarised(settings: DimensionSettings, weights: int, metric: str, points: list[Point]) -> Measured:
    """Where d90 lies in each seed, from the finished points."""
    of_gain, of_score = [], []
    for full, frozen, curve in _by_seed(settings, points):
        better = full > frozen
        of_gain.append(crossing(curve, frozen + 0.9 * (full - frozen)) if better else None)
        of_score.append(crossing(curve, 0.9 * full) if better and metric == "accuracy" else None)
    return Measured(weights, metric, tuple(points), tuple(of_gain), tuple(of_score))


def _by_seed(settings: DimensionSettings, points: list[Point]) -> Iterator[tuple[float, float, dict[int, float]]]:
    for seed in range(settings.seed, settings.seed + settings.seeds):
        scores = {point.name: point.score for point in points if point.seed == seed}
        yield scores[FULL], scores[FROZEN], {d: scores[str(d)] for d in settings.ladder if str(d) in scores}
