"""A loss without the noise of its batches: an exponential mean, m ← w·m + (1 − w)·x."""

WEIGHT = 0.8  # of what was: about the last five values count


class Smoothed:
    """The mean of the values so far, later ones counting more: mₙ/(1 − wⁿ), which a constant is itself of.

    weight: w of the formula, in [0, 1); with 0 each value is its own mean.
    """

    def __init__(self, weight: float = WEIGHT) -> None:
        self.weight = weight
        self._sum = self._share = 0.0

    def add(self, value: float) -> float:
        """One value more; returns the mean with it."""
        self._sum = self.weight * self._sum + (1.0 - self.weight) * value
        self._share = self.weight * self._share + (1.0 - self.weight)  # 1 − wⁿ
        return self._sum / self._share


def smoothed(values: list[float], weight: float = WEIGHT) -> list[float]:
    """The mean after each value."""
    mean = Smoothed(weight)
    return [mean.add(value) for value in values]
