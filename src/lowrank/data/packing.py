"""Rows end to end in rows of the longest length, so that little is padded: which go together, and what they become.

Which rows go together is a function of their lengths and the longest length, nothing else; in which order the packs
come, `data.batches` says, by seed and epoch alone. A pack knows where its rows start, from which their positions are
counted anew; that no row then sees another is the model's matter, which `train.packing` tries.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, overload

from lowrank.data.examples import IGNORED, Encoded, Example, lengths_of


def best_fit(lengths: Any, room: int) -> "Members":
    """The rows of every pack: longest first, each where it leaves the least room. O(n log room).

    At most 11/9 of the packs that the best packing has (and one more): best fit decreasing, Johnson et al. 1974. In
    memory: some 50 bytes a row while it is done, 8 afterwards.
    """
    import numpy

    sizes = numpy.asarray(lengths, dtype=numpy.int64)
    order = numpy.argsort(-sizes, kind="stable")
    pack_of = array("q", bytes(8 * len(sizes)))  # by place in `order`
    waiting: dict[int, array[int]] = {}  # packs by the room that they have left
    rooms: list[int] = []  # the keys of `waiting`, in order
    packs = 0
    for place, row in enumerate(order):
        size = int(sizes[row])
        at = bisect_left(rooms, size)
        left = rooms[at] if at < len(rooms) else room
        number = waiting[left].pop() if at < len(rooms) else packs
        if number == packs:
            packs += 1
        elif not waiting[left]:
            del waiting[left], rooms[at]
        pack_of[place] = number
        if (left := left - size) > 0:
            if left not in waiting:
                rooms.insert(bisect_left(rooms, left), left)
            waiting.setdefault(left, array("q")).append(number)
    numbers = numpy.frombuffer(pack_of, dtype=numpy.int64)
    edges = numpy.concatenate([[0], numpy.cumsum(numpy.bincount(numbers, minlength=packs))])
    return Members(order[numpy.argsort(numbers, kind="stable")], edges)


@dataclass(frozen=True, slots=True, eq=False)
class Members(Sequence[Sequence[int]]):
    """The rows of every pack, in the order in which they came to it. rows: pack by pack; edges: where each begins."""

    rows: Any  # (rows,)
    edges: Any  # (packs + 1,)

    def __len__(self) -> int:
        return len(self.edges) - 1

    @overload
    def __getitem__(self, at: int) -> list[int]: ...
    @overload
    def __getitem__(self, at: slice) -> list[list[int]]: ...
    def __getitem__(self, at: int | slice) -> list[int] | list[list[int]]:
        if isinstance(at, slice):
            return [self[number] for number in range(len(self))[at]]
        at = range(len(self))[at]
        found: list[int] = self.rows[self.edges[at] : self.edges[at + 1]].tolist()
        return found


def end_to_end(rows: Sequence[Example]) -> Example:
    """Rows as one that knows where each starts. The first token of each is not trained: it would follow another's."""
    ids = [token for row in rows for token in row.ids]
    labels = [label for row in rows for label in (IGNORED, *row.labels[1:])]
    return Example(ids, labels, starts=(0, *accumulate(len(row.ids) for row in rows[:-1])))


def parts(pack: Example) -> list[Example]:
    """The rows of a pack."""
    edges = [*pack.starts, len(pack.ids)]
    return [Example(pack.ids[start:end], pack.labels[start:end]) for start, end in pairwise(edges)]


@dataclass(frozen=True, slots=True, eq=False)
class Packs(Sequence[Example]):
    """Packs of rows, each put together when it is asked for. lengths: (packs,) how many tokens each has."""

    rows: Sequence[Example]
    members: Members
    lengths: Any

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[number] for number in range(len(self))[at]]
        return end_to_end([self.rows[row] for row in self.members[at]])

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    @property
    def shared(self) -> Any:
        """Which packs hold several rows, in order."""
        import numpy

        return numpy.flatnonzero(numpy.diff(self.members.edges) > 1)


def pack(data: Encoded, longest: int) -> Encoded:
    """The data set in packs of at most `longest` tokens."""
    import numpy

    sizes = lengths_of(data.examples)
    members = best_fit(sizes, longest)
    lengths = numpy.add.reduceat(sizes[members.rows], members.edges[:-1])
    totals = (data.tokens, data.trained, *data.between)  # no first token of a row is trained in the data set either
    return replace(data, examples=Packs(data.examples, members, lengths), packed=len(data.examples), totals=totals)
