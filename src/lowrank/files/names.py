"""What may be the name of a tensor or a module: printable, and of a length that a pattern can be tried on."""

LONGEST = 1000  # characters; the longest of the models that we know has 120


def is_name(text: object) -> bool:
    """True for a text that a terminal shows as it is, of 1 to LONGEST characters."""
    return isinstance(text, str) and 0 < len(text) <= LONGEST and text.isprintable()
