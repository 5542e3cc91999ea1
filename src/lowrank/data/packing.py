"""Rows end to end in rows of the longest length, so that little is padded: which go together, and what they become.

Which rows go together is a function of their lengths and the longest length, nothing else; in which order the packs
come, `data.batches` says, by seed and epoch alone. A pack knows where its rows start, from which their positions are
counted anew; that no row then sees another is the model's matter, which `train.packing` tries.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import overload

from lowrank.data.examples import IGNORED, Encoded, Example


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The rows of every pack: longest first, each where it leaves the least room. O(n log room).

    At most 11/9 of the packs that the best packing has (and one more): best fit decreasing, Johnson et al. 1974.
    """
    packs: list[list[int]] = []
    waiting: dict[int, list[int]] = {}  # packs by the room that they have left
    rooms: list[int] = []  # the keys of `waiting`, in order
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[row])
        left = rooms[at] if at < len(rooms) else room
        number = waiting[left].pop() if at < len(rooms) else len(packs)
        if number == len(packs):
            packs.append([])
        elif not waiting[left]:
            del waiting[left], rooms[at]
        packs[number].append(row)
        if (left := left - lengths[row]) > 0:
            if left not in waiting:
                rooms.insert(bisect_left(rooms, left), left)
            waiting.setdefault(left, []).append(number)
    return packs


def end_to_end(rows: Sequence[Example]) -> Example:
    """Rows as one that knows where each starts. The first token of each is not trained: it would follow another's."""
    ids = [token for row in rows for token in row.ids]
    labels = [label for row in rows for label in (IGNORED, *row.labels[1:])]
    return Example(ids, labels, starts=(0, *accumulate(len(row.ids) for row in rows[:-1])))


def parts(pack: Example) -> list[Example]:
    """The rows of a pack."""
    edges = [*pack.starts, len(pack.ids)]
    return [Example(pack.ids[start:end], pack.labels[start:end]) for start, end in pairwise(edges)]


@dataclass(frozen=True, slots=True)
class Packs(Sequence[Example]):
    """Packs of rows, each put together when it is asked for."""

    rows: Sequence[Example]
    members: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> "Packs": ...
    def __getitem__(self, at: int | slice) -> "Example | Packs":
        if isinstance(at, slice):
            return Packs(self.rows, self.members[at])
        return end_to_end([self.rows[row] for row in self.members[at]])

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))


def pack(data: Encoded, longest: int) -> Encoded:
    """The data set in packs of at most `longest` tokens."""
    members = best_fit([len(example.ids) for example in data.examples], longest)
    return replace(data, examples=Packs(data.examples, members), packed=len(data.examples))
