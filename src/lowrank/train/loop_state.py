"""All that a step changes beside the weights, the random states and what a forward pass changes of a model."""

from dataclasses import dataclass, field

from torch import Tensor

from lowrank.train.evaluation import Scores
from lowrank.train.optimiser import Optimiser


@dataclass(slots=True)
class Interval:
    """What happened since the last report. total: summed loss; seconds: in steps, evaluations apart."""

    total: float = 0.0
    trained: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class LoopState:
    """step: how many were taken; trained, tokens: what was trained and read so far; interval: since the last report.

    evaluations: (step, scores) in order; best_weights: copies of the trained tensors at the best evaluation, where they
    are to be kept; halvings: how often the rate was halved, since a training that diverged went back.
    """

    optimiser: Optimiser
    step: int = 0
    trained: int = 0
    tokens: int = 0
    interval: Interval = field(default_factory=Interval)
    evaluations: list[tuple[int, Scores]] = field(default_factory=list)
    best_weights: list[Tensor] | None = None
    halvings: int = 0

    @property
    def best(self) -> tuple[int, Scores] | None:
        """The evaluation with the least loss, the first of equals."""
        return min(self.evaluations, key=lambda found: found[1].loss, default=None)

    @property
    def evaluated(self) -> bool:
        """Whether the weights are evaluated as they are."""
        return bool(self.evaluations) and self.evaluations[-1][0] == self.step
