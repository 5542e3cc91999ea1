"""Many expressions on many names: those that are plain words, as nearly all are, are looked up; the others are tried.

An adapter of ours may name 4,000 modules by their paths, in one expression or as 4,000 keys: each name is still found
in a few look-ups. Dots in a plain word mean any character, as they do in PEFT's reading of it.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Words
from operator import itemgetter
from typing import Any

from lowrank.injection.regex.nodes import Either, Node, OneOf, Place, Sequence, Word, size
from lowrank.injection.regex.parse import parse
from lowrank.injection.regex.sweep import Sweep

LONGEST = 2_000_000  # characters in all
LARGEST = 4000  # nodes of all that are no plain words
STEPS, STEPS_A_NAME = 3_000_000, 2000  # some seconds in all, and a millisecond more for each name

Plain = tuple[str, bool]  # a word in which "\0" stands for any character, and whether only a whole name is meant


class Table:
    """Expressions in their order. Raises ValueError, with what is wrong, for one that is none or too large."""

    def __init__(self, expressions: Words[str]) -> None:
        if sum(map(len, expressions)) > LONGEST:
            raise ValueError(f"it has more than {LONGEST:,} characters")
        self._words: dict[int, dict[tuple[tuple[int, ...], bool], dict[Any, int]]] = {}
        self._others: list[tuple[int, Node]] = []
        self._trees = [parse(expression) for expression in expressions]
        for number, tree in enumerate(self._trees):
            for branch in tree.items if isinstance(tree, Either) else (tree,):
                self._add(number, branch)
        if sum(size(tree) for _, tree in self._others) > LARGEST:
            raise ValueError("it is too large to be tried on every module: name the modules")
        self._known: dict[tuple[str, bool], int | None] = {}
        self._steps_left = STEPS

    def _add(self, number: int, branch: Node) -> None:
        plain = _plain(branch)
        if plain is None:
            self._others.append((number, branch))
            return
        word, whole = plain
        dots = tuple(place for place, sign in enumerate(word) if sign == "\0")
        words = self._words.setdefault(len(word), {}).setdefault((dots, whole), {})
        words.setdefault(_without(word, dots), number)

    def first(self, name: str, *, whole: bool) -> int | None:
        """The number of the first expression that matches all of `name`, or, not `whole`, its end after any dot.

        None where none does. Raises ValueError where the expressions take too many steps.
        """
        key = (name, whole)
        if key not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[key] = self._find(name, [0] if whole else _starts(name), whole)
        return self._known[key]

    def _find(self, name: str, starts: list[int], whole: bool) -> int | None:
        if "\n" in name:  # `.` and `$` mean something else there
            return self._tried(name, starts, list(enumerate(self._trees)), whole)
        found = self._tried(name, starts, self._others, whole)
        return min((number for number in (found, *self._looked_up(name, starts)) if number is not None), default=None)

    def words_in(self, name: str) -> list[int]:
        """The numbers of the expressions that are plain words and match the end of `name` after any dot."""
        return list(self._looked_up(name, _starts(name)))

    def _looked_up(self, name: str, starts: list[int]) -> Iterator[int]:
        for start in starts:
            rest = name[start:]
            for (dots, anchored), words in self._words.get(len(rest), {}).items():
                number = words.get(_without(rest, dots)) if not (anchored and start) else None
                if number is not None:
                    yield number

    def _tried(self, name: str, starts: list[int], trees: list[tuple[int, Node]], whole: bool) -> int | None:
        if not trees:
            return None
        sweep, places = Sweep(name), sum(1 << start for start in starts)
        ends = 1 << len(name) if whole else sweep.text.places("$")
        self._steps_left += STEPS_A_NAME
        for number, tree in trees:
            hit = sweep.run(tree, places) & ends
            if sweep.steps > self._steps_left:
                raise ValueError("it takes too many steps: name the modules, or write it without nested repetitions")
            if hit:
                self._steps_left -= sweep.steps
                return number
        self._steps_left -= sweep.steps
        return None


def _starts(name: str) -> list[int]:
    """Where the ends of a name begin: at its start and after every dot."""
    line = name.partition("\n")[0]
    return [0, *(place + 1 for place, sign in enumerate(line) if sign == ".")]


def _without(word: str, dots: tuple[int, ...]) -> Any:
    """The word without the characters at `dots`, to be compared."""
    if not dots:
        return word
    kept = sorted({*range(len(word))} - {*dots})
    return itemgetter(*kept)(word) if kept else ""


def _plain(node: Node) -> Plain | None:
    """The word that the expression is, if it is no more than that."""
    items = list(node.items) if isinstance(node, Sequence) else [node]
    whole = bool(items) and isinstance(items[0], Place) and items[0].kind in "^A"
    ended = bool(items) and isinstance(items[-1], Place) and items[-1].kind in "$Z" and len(items) > whole
    signs = []
    for item in items[whole : len(items) - ended]:
        if isinstance(item, Word):
            signs.append(item.text)
        elif isinstance(item, OneOf) and item.name == ".":
            signs.append("\0")
        else:
            return None
    word = "".join(signs)
    return (word, whole) if word.count("\0") == signs.count("\0") else None
