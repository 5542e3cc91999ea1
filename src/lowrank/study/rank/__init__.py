"""Which rank each module needs: a heuristic, from the gradient before training or from an adapter after it."""

from lowrank.study.rank.choice import Choice, from_adapter, from_gradient
from lowrank.study.rank.settings import AdapterRankSettings, GradientRankSettings

__all__ = ["AdapterRankSettings", "Choice", "GradientRankSettings", "from_adapter", "from_gradient"]
