"""The words of nano's little world, and the one rule that keeps some of its facts unseen."""

import zlib
from typing import Final

PRONOUNS: Final = {
    "she": ("Mia", "Anna", "Lily", "Zoe", "Ruth", "Nina", "Ella", "Rosa", "Ivy", "Clara", "Emma", "Lucy"),
    "he": ("Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Noah", "Finn", "Paul", "Omar", "Hugo", "Carl"),
}
NAMES: Final = PRONOUNS["she"] + PRONOUNS["he"]
THINGS: Final = (
    "ball", "kite", "drum", "book", "hat", "cup", "boat", "lamp", "box", "bell",
    "coat", "cart", "doll", "flag", "harp", "key", "mask", "pen", "rope", "sled",
    "spoon", "scarf", "train", "umbrella", "violin", "basket", "bottle", "carpet", "ladder", "mirror",
)  # fmt: skip
COLOURS: Final = ("red", "blue", "green", "yellow", "orange", "purple", "brown", "black", "white", "pink")
LOOKS: Final = ("big", "small", "tiny", "old", "new", "shiny", "heavy", "lovely")
PLACES: Final = (
    "garden", "kitchen", "park", "forest", "barn", "attic", "cellar", "school", "library", "market",
    "meadow", "tower", "museum", "village", "office", "shop",
)  # fmt: skip

HELD_OUT_SHARE: Final = 8  # one pair of person and thing in this many is held out


def held_out(name: str, thing: str) -> bool:
    """Whether nobody may ever tell nano, in pretraining or in the skill's training rows, that `name` has a `thing`.

    A fixed hash of the pair decides, so that the split is the same on every machine and for every seed.
    """
    return zlib.crc32(f"{name}|{thing}".encode()) % HELD_OUT_SHARE == 0


def with_article(phrase: str) -> str:
    """`phrase` with "a" or "an" before it; the world's words have no silent h and no "u" said as "you"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
