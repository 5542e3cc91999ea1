"""One expression on one name: the set of places that can be reached, moved through the tree.

A set of places 0..n is a whole number, bit i for the place before character i. All operations are linear in sets, so
a repetition needs no place twice: each is moved through its item once, however deep repetitions nest.
"""

from functools import lru_cache

from lowrank.injection.regex.nodes import ANY, Either, Look, Many, Node, OneOf, Place, Sequence, Word


class Text:
    """A name: for every character and class, the set of places where one stands."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.every = (1 << (len(text) + 1)) - 1
        self._signs: dict[str, int] = {}
        for place, sign in enumerate(text):
            self._signs[sign] = self._signs.get(sign, 0) | 1 << place
        self._classes: dict[str, int] = {}

    def sign(self, sign: str) -> int:
        """Where this character stands."""
        return self._signs.get(sign, 0)

    def one_of(self, node: OneOf) -> int:
        """Where a character of the class stands."""
        if node.name not in self._classes:
            self._classes[node.name] = sum(places for sign, places in self._signs.items() if node.accepts(sign))
        return self._classes[node.name]

    def places(self, kind: str) -> int:
        """Where `kind`, a place of nodes.Place, is."""
        end = 1 << len(self.text)
        if kind in "^A":
            return 1
        if kind in "$Z":
            return end | (end >> 1 if kind == "$" and self.text.endswith("\n") else 0)
        words = sum(places for sign, places in self._signs.items() if sign.isalnum() or sign == "_")
        borders = (words ^ (words << 1)) & self.every
        return borders if kind == "b" else self.every & ~borders if self.text else 0


@lru_cache(maxsize=8192)
def text_of(name: str) -> Text:
    """The name, made ready once for all expressions."""
    return Text(name)


class Sweep:
    """Expressions on one name. steps: how many nodes were entered."""

    def __init__(self, name: str) -> None:
        self.text = text_of(name)
        self.steps = 0
        self._reached: dict[Node, int] = {}
        self._true: dict[Node, int] = {}

    def run(self, node: Node, places: int, forward: bool = True) -> int:
        """The places that the expression can end at from any of `places`; where not `forward`, the other way round.

        A repetition within a repetition gives back only places that it has not given back before.
        """
        self.steps += 1
        if not places:
            return 0
        match node:
            case Word(word):
                return self._word(word, places, forward)
            case OneOf():
                here = self.text.one_of(node)
                return (places & here) << 1 if forward else (places >> 1) & here
            case Sequence(items):
                for item in items if forward else reversed(items):
                    places = self.run(item, places, forward)
                return places
            case Either(items):
                found = 0
                for item in items:
                    found |= self.run(item, places, forward)
                return found
            case Many(item):
                return self._many(node, item, places, forward)
            case Place(kind):
                return places & self.text.places(kind)
            case Look(_, _, wanted):
                true = self._look(node)
                return places & (true if wanted else ~true)
        raise AssertionError(node)

    def _word(self, word: str, places: int, forward: bool) -> int:
        for sign in word if forward else reversed(word):
            here = self.text.sign(sign)
            places = (places & here) << 1 if forward else (places >> 1) & here
            if not places:
                break
        return places

    def _many(self, node: Node, item: Node, places: int, forward: bool) -> int:
        reached = before = self._reached.get(node, 0)
        fresh = places & ~reached
        if isinstance(item, OneOf) and item.name == ANY.name and fresh and "\n" not in self.text.text:
            low = fresh & -fresh  # any characters: everything behind the first place, or before the last
            reached |= self.text.every & (-low if forward else (1 << fresh.bit_length()) - 1)
            fresh = 0
        while fresh:
            reached |= fresh
            fresh = self.run(item, fresh, forward) & ~reached
        self._reached[node] = reached
        return reached & ~before

    def _look(self, node: Look) -> int:
        """Where the item follows (ahead) or stands before, computed once."""
        if node not in self._true:
            self._true[node] = self.run(node.item, self.text.every, forward=not node.ahead)
        return self._true[node]
