"""The intrinsic dimension of a task: how few numbers, in a random subspace of the weights, learn it almost as well."""

from lowrank.study.dimension.crossing import Crossing, crossing
from lowrank.study.dimension.ladder import Measured, measure_dimension
from lowrank.study.dimension.settings import DimensionSettings

__all__ = ["Crossing", "DimensionSettings", "Measured", "crossing", "measure_dimension"]
