"""A regular expression as a tree. Every node is an object of its own: sweeping keeps what it has seen by node."""

from collections.abc import Callable
from dataclasses import dataclass


class Node:
    """Any of the below."""

    __slots__ = ()


@dataclass(eq=False, slots=True)
class Word(Node):
    """The characters of `text`, one after another."""

    text: str


@dataclass(eq=False, slots=True)
class OneOf(Node):
    """One character that `accepts` takes; name: equal for those that take the same."""

    name: str
    accepts: Callable[[str], bool]


@dataclass(eq=False, slots=True)
class Sequence(Node):
    """All items, one after another."""

    items: tuple[Node, ...]


@dataclass(eq=False, slots=True)
class Either(Node):
    """Any of the items."""

    items: tuple[Node, ...]


@dataclass(eq=False, slots=True)
class Many(Node):
    """The item, any number of times, none too."""

    item: Node


@dataclass(eq=False, slots=True)
class Place(Node):
    """Nothing, at a certain place: one of ^ $ A Z b B."""

    kind: str


@dataclass(eq=False, slots=True)
class Look(Node):
    """Nothing, where the item does (or does not) follow, or stand before."""

    item: Node
    ahead: bool
    wanted: bool


ANY = OneOf(".", lambda sign: sign != "\n")  # a template: `copied` before it goes into a tree


def copied(node: Node) -> Node:
    """The same expression in nodes of its own."""
    match node:
        case Word(text):
            return Word(text)
        case OneOf(name, accepts):
            return OneOf(name, accepts)
        case Sequence(items):
            return Sequence(tuple(map(copied, items)))
        case Either(items):
            return Either(tuple(map(copied, items)))
        case Many(item):
            return Many(copied(item))
        case Place(kind):
            return Place(kind)
        case Look(item, ahead, wanted):
            return Look(copied(item), ahead, wanted)
    raise AssertionError(node)


def size(node: Node) -> int:
    """How many nodes, a word counted by its characters."""
    match node:
        case Word(text):
            return len(text)
        case Sequence(items) | Either(items):
            return 1 + sum(map(size, items))
        case Many(item) | Look(item, _, _):
            return 1 + size(item)
    return 1
