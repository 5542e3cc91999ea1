"""Values to levels of colour, and the legend that says which is which."""

from dataclasses import dataclass

from lowrank.analysis.figures.svg import tag, text, title
from lowrank.analysis.words import number

LEVELS = 9
SWATCH = 18


@dataclass(frozen=True, slots=True)
class Scale:
    """`LEVELS` equal steps from low to high. diverging: two hues that part in the middle, else one that grows."""

    low: float
    high: float
    diverging: bool = False

    def level(self, value: float) -> int:
        """Which step, from 0."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return max(0, min(LEVELS - 1, int(share * LEVELS)))

    def style(self, value: float) -> str:
        """The class of a shape that has this value."""
        return self._class(self.level(value))

    def ink(self, value: float) -> str:
        """The class of words written onto that shape."""
        level = self.level(value)
        strong = abs(level - LEVELS // 2) >= 3 if self.diverging else level >= 5
        return "on-strong" if strong else "on-weak"

    def legend(self, x: float, y: float) -> list[str]:
        """The steps in a row, 18 high, with both ends named."""
        step = (self.high - self.low) / LEVELS
        parts = [text(x, y + 13, number(self.low), "tick")]
        left = x + 8 * len(number(self.low)) + 6
        for level in range(LEVELS):
            bounds = f"{number(self.low + level * step)} to {number(self.low + (level + 1) * step)}"
            place = {"x": left + level * SWATCH, "y": y, "width": SWATCH, "height": SWATCH - 2}
            parts.append(tag("rect", place | {"class": self._class(level)}, title(bounds)))
        parts.append(text(left + LEVELS * SWATCH + 6, y + 13, number(self.high), "tick"))
        return parts

    def _class(self, level: int) -> str:
        return f"{'d' if self.diverging else 'q'}{level}"
