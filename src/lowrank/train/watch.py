"""Who looks on while a loop runs: what is asked of it, between the steps and where it cannot go on."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank.train.loop import Loop


class Watch:
    """This one only looks."""

    def between(self, loop: "Loop") -> None:
        """Where nothing is half done: before the first step, and after each with what was due at it."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Around an evaluation, which changes nothing: it may be left, and is made up for when the run goes on."""
        return nullcontext()

    def places(self, _examples: Sequence[int]) -> list[str]:
        """file:line of the rows in these examples; none where that is not known."""
        return []

    def saved(self) -> str:
        """What there is of a training that cannot go on, as the middle of a sentence."""
        return "nothing was saved"
