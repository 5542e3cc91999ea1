"""SVG as text, escaped."""

from collections.abc import Iterable, Mapping
from html import escape

Attributes = Mapping[str, str | float]


def tag(name: str, attributes: Attributes, content: str = "") -> str:
    """One element. content: elements, already text of SVG."""
    written = "".join(f' {key}="{_value(value)}"' for key, value in attributes.items())
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def text(x: float, y: float, words: str, style: str, turned: float = 0.0) -> str:
    """Words at a place. style: class names; turned: degrees, clockwise."""
    attributes: dict[str, str | float] = {"x": x, "y": y, "class": style}
    if turned:
        attributes["transform"] = f"rotate({_value(turned)} {_value(x)} {_value(y)})"
    return tag("text", attributes, escape(words) or " ")


def title(words: str) -> str:
    """What a pointer over the element shows."""
    return f"<title>{escape(words)}</title>"


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return tag("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": style})


def polyline(points: Iterable[tuple[float, float]], style: str, words: str) -> str:
    """A line through points, with a title."""
    joined = " ".join(f"{_value(x)},{_value(y)}" for x, y in points)
    return tag("polyline", {"points": joined, "class": style}, title(words))


def picture(width: float, height: float, content: Iterable[str], label: str) -> str:
    """A whole figure, no wider than its page. label: what it shows, for those who do not see it."""
    attributes: dict[str, str | float] = {
        "viewBox": f"0 0 {_value(width)} {_value(height)}",
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": label,
    }
    return tag("svg", attributes, "".join(content))


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:.2f}".rstrip("0").rstrip(".")
