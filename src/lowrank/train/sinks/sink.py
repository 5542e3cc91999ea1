"""What a sink is, which there are, and the reporter that passes a run's figures on to them."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from lowrank.errors import ConfigError, LowrankWarning, short
from lowrank.train.evaluation import Scores
from lowrank.train.reporting import Progress, Reporter, Sample

SINKS = {  # name: what it imports; each is opened by `open_sink` in the file of its name
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}


class Sink(Protocol):
    """A run in another program's book."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures after a step, by names such as train/loss."""

    def write_text(self, step: int, text: str) -> None:
        """The answers to sample prompts after a step."""

    def close(self) -> None:
        """Nothing more will be written."""


def check_sinks(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that is no sink's, and for one whose package is not installed."""
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"--log-to {name}: not known, only {', '.join(SINKS)}")
        try:
            import_module(SINKS[name])
        except ImportError as error:
            raise ConfigError(f"--log-to {name} needs the package {name}: pip install {name}") from error


class ToSink(Reporter):
    """Passes on what a run reports. A sink that fails is said once and left: a training is worth more."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self.name = name
        self.sink: Sink | None = None
        self._tried(lambda: setattr(self, "sink", open_sink()))

    def progressed(self, progress: Progress) -> None:
        """The step's figures, as train/NAME."""
        told = {name: value for name, value in progress.as_json().items() if name != "step"}
        self._write(progress.step, {f"train/{name}": float(value) for name, value in told.items()})

    def evaluated(self, step: int, scores: Scores) -> None:
        """The evaluation's figures, as eval/NAME."""
        self._write(step, {f"eval/{name}": value for name, value in {"loss": scores.loss, **scores.figures}.items()})

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """The answers, as eval/samples."""
        text = "\n\n".join(f"{one.prompt}\n→ {one.answer}" for one in samples)
        if (sink := self.sink) is not None:
            self._tried(lambda: sink.write_text(step, text))

    def close(self) -> None:
        """In the end, however that came."""
        if (sink := self.sink) is not None:
            self._tried(sink.close)

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        if (sink := self.sink) is not None:
            self._tried(lambda: sink.write(step, figures))

    def _tried(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # of a program that is not ours: a network, a quota, a login
            self.sink = None
            reason = short(" ".join(str(error).split()) or type(error).__name__, 200)
            warnings.warn(
                f"--log-to {self.name}: it takes no more ({reason}); the training goes on", LowrankWarning, stacklevel=2
            )


@contextmanager
def opened(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], start: int | None
) -> Iterator[list[ToSink]]:
    """The sinks of these names for the run in `folder`, open for the block. start: the step that it goes on from."""

    def opening(name: str) -> Callable[[], Sink]:
        module = import_module(f"lowrank.train.sinks.{name}")
        return lambda: module.open_sink(folder, settings, start)

    sinks = [ToSink(name, opening(name)) for name in names]
    try:
        yield sinks
    finally:
        for sink in sinks:
            sink.close()
