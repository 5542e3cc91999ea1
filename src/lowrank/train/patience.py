"""When a training stops since its evaluations get no better: by them alone, so that a run that goes on knows too."""

from collections.abc import Sequence

from lowrank.train.evaluation import Scores


def out_of_patience(evaluations: Sequence[tuple[int, Scores]], patience: int | None) -> bool:
    """Whether the last `patience` evaluations, (step, scores) in order, were all no lower than one before them."""
    if patience is None or len(evaluations) <= patience:
        return False
    losses = [scores.loss for _, scores in evaluations]
    return min(losses[:-patience]) <= min(losses[-patience:])
