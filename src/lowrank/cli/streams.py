"""What stdout and stderr do with a sign that their encoding has not: they say it otherwise, and nothing fails for it.

A terminal of code page 1252, or a log file under LANG=C, cannot hold "‖ΔW‖"; the work that it reports is done by then.
"""

import codecs
import sys

HANDLER = "lowrank.otherwise"
OTHERWISE = {
    "‖": "||", "Δ": "d", "δ": "d", "·": "*", "•": "*", "×": "x", "−": "-", "–": "-", "—": "-", "→": "->", "←": "<-",
    "…": "...", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "≡": "=", "√": "sqrt", "Σ": "sum", "σ": "sigma", "φ": "phi",
    "α": "alpha", "θ": "theta", "λ": "lambda", "∞": "inf", "∈": "in", "ᵀ": "^T", "²": "^2", "³": "^3", "½": "1/2",
    "⁻": "^-", "∘": "o", "≪": "<<", "≫": ">>", "°": " degrees", "±": "+-", "∝": "~", "₁": "1", "₂": "2", "⊙": "*",
    "∂": "d", "π": "pi", "§": "section ", "⁴": "^4", "⁵": "^5", "━": "-", "─": "-", "│": "|",
}  # fmt: skip


def say_anything() -> None:
    """In place: let stdout and stderr write any text, whatever their encoding."""
    codecs.register_error(HANDLER, _otherwise)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=HANDLER)


def _otherwise(error: UnicodeError) -> tuple[str, int]:
    """The signs that cannot be encoded in words of ASCII, or as their escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    text = "".join(OTHERWISE.get(sign) or sign.encode("unicode_escape").decode("ascii") for sign in signs)
    return text, error.end
