"""From the text of a regular expression to its tree: Python's syntax but for what only trying one way can do.

Back references, flags, atomic groups and conditions are refused, in words; lazy and greedy repetitions are the same
here, since only whether a name is matched is asked.
"""

import re
from collections.abc import Callable

from lowrank.injection.regex.nodes import ANY, Either, Look, Many, Node, OneOf, Place, Sequence, Word, copied, size

DEEPEST, REPEATS, LARGEST = 40, 255, 4000
PLAIN = re.compile(r"[\w/ ~@#%&=:;,<>\"'!`-]+")
COUNT = re.compile(r"\{(?:(\d{1,9})(,?)(\d{0,9})|,(\d{1,9}))\}")
NAMED = re.compile(r"\?P<[^\W\d]\w*>")
LOOKS = {"?=": (True, True), "?!": (True, False), "?<=": (False, True), "?<!": (False, False)}
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "D": lambda sign: not sign.isdecimal(),
    "w": lambda sign: sign.isalnum() or sign == "_",
    "W": lambda sign: not (sign.isalnum() or sign == "_"),
    "s": str.isspace,
    "S": lambda sign: not sign.isspace(),
}


def parse(text: str) -> Node:
    """The tree of an expression. Raises ValueError, with what is wrong, for one that is none or that is refused."""
    reader = _Reader(text)
    node = reader.either(0)
    if reader.at < len(text):
        raise ValueError("unbalanced parenthesis")
    return node


class _Reader:
    """Reads the text from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def take(self, word: str) -> bool:
        """Step over `word` where it is next."""
        found = self.text.startswith(word, self.at)
        self.at += len(word) if found else 0
        return found

    def next(self, what: str) -> str:
        """The next character, which must be there."""
        if self.at >= len(self.text):
            raise ValueError(f"it ends in the middle of {what}")
        self.at += 1
        return self.text[self.at - 1]

    def either(self, depth: int) -> Node:
        """Alternatives, up to a closing parenthesis or the end."""
        if depth > DEEPEST:
            raise ValueError(f"parentheses nested more than {DEEPEST} deep")
        items = [self.sequence(depth)]
        while self.take("|"):
            items.append(self.sequence(depth))
        return items[0] if len(items) == 1 else Either(tuple(items))

    def sequence(self, depth: int) -> Node:
        """What stands one after another, each with its repetition."""
        items: list[Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            items += self.word() or [self.repeated(self.atom(depth))]
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def word(self) -> list[Node]:
        """Plain characters as one node; the last one is left where a repetition follows."""
        match = PLAIN.match(self.text, self.at)
        if match is None:
            return []
        end = match.end() - (self.text[match.end() : match.end() + 1] in ("*", "+", "?", "{"))
        if end <= self.at:
            return []
        start, self.at = self.at, end
        return [Word(self.text[start:end])]

    def atom(self, depth: int) -> Node:
        """One character, class, place or group."""
        sign = self.next("something")
        if sign == "(":
            return self.group(depth)
        if sign == "[":
            return self.characters()
        if sign == "\\":
            return self.escape()
        if sign == ".":
            return copied(ANY)
        if sign in "^$":
            return Place(sign)
        if sign in "*+?":
            raise ValueError(f"nothing to repeat before {sign!r}")
        return Word(sign)

    def group(self, depth: int) -> Node:
        """What is in parentheses."""
        look = next((word for word in LOOKS if self.take(word)), None)
        if look is None and not self.take("?:"):
            if match := NAMED.match(self.text, self.at):
                self.at = match.end()
            elif self.text.startswith("?", self.at):
                raise ValueError(f"'({self.text[self.at : self.at + 2]}' is not understood here")
        node = self.either(depth + 1)
        if not self.take(")"):
            raise ValueError("missing )")
        if look:
            return Look(node, *LOOKS[look])
        return Sequence((node,)) if isinstance(node, Place) else node  # in parentheses it may be repeated

    def escape(self) -> Node:
        """What a backslash makes of the next character."""
        sign = self.next("an escape")
        if sign in CLASSES:
            return OneOf("\\" + sign, CLASSES[sign])
        if sign in "AZbB":
            return Place(sign)
        if sign.isdigit():
            raise ValueError("a back reference is not understood here")
        return Word(self.literal(sign))

    def literal(self, sign: str) -> str:
        """The character that the escape of `sign` means."""
        if sign in CONTROLS:
            return CONTROLS[sign]
        if sign.isascii() and sign.isalnum():
            raise ValueError(f"bad escape \\{sign}")
        return sign

    def characters(self) -> Node:
        """A class in brackets."""
        start, unwanted = self.at, self.take("^")
        tests: list[Callable[[str], bool]] = []
        while not tests or not self.take("]"):
            tests.append(self.member())
        name = f"[{self.text[start : self.at]}"
        return OneOf(name, lambda sign: any(test(sign) for test in tests) != unwanted)

    def member(self) -> Callable[[str], bool]:
        """A character, an escape or a range of a class."""
        low = self.next("a class")
        if low == "\\":
            low = self.next("a class")
            if low in CLASSES:
                return CLASSES[low]
            low = "\b" if low == "b" else self.literal(low)
        if self.text[self.at : self.at + 1] != "-" or self.text[self.at + 1 : self.at + 2] in ("]", ""):
            return low.__eq__
        self.at += 1
        high = self.next("a class")
        if high == "\\":
            high = self.next("a class")
            if high in CLASSES:
                raise ValueError(f"bad character range {low}-\\{high}")
            high = "\b" if high == "b" else self.literal(high)
        if high < low:
            raise ValueError(f"bad character range {low}-{high}")
        return lambda sign: low <= sign <= high

    def repeated(self, node: Node) -> Node:
        """The node with the repetition that follows it, if one does."""
        least, most = self.repetition()
        if (least, most) == (1, 1):
            return node
        if isinstance(node, Place):
            raise ValueError("nothing to repeat")
        if self.text[self.at : self.at + 1] in ("*", "+") or self.text.startswith("?", self.at + self.take("?")):
            raise ValueError("multiple repeat")
        if most is not None and most < least:
            raise ValueError("the smallest number of repetitions is above the largest")
        if max(least, most or 0) > REPEATS or size(node) * max(least, most or 0, 1) > LARGEST:
            raise ValueError("it repeats too much too often")
        head = [copied(node) for _ in range(least)]
        if most is None:
            return Sequence((*head, Many(node)))
        tail: Node = Sequence(())
        for _ in range(most - least):
            tail = Either((Sequence((copied(node), tail)), Sequence(())))
        return Sequence((*head, tail))

    def repetition(self) -> tuple[int, int | None]:
        """(least, most) of the repetition that is next; None is no bound, (1, 1) none there."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        match = COUNT.match(self.text, self.at)
        if match is None:
            return 1, 1
        self.at = match.end()
        least, comma, most, upto = match.groups()
        if upto is not None:
            return 0, int(upto)
        return int(least), int(most) if most else None if comma else int(least)
