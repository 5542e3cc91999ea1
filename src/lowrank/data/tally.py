"""What is found while rows become tokens, a part at a time: counted, so that nothing of it grows with the data."""

import warnings
from dataclasses import dataclass, field

from lowrank.data.dataset import Dataset
from lowrank.data.faults import Faults, settle
from lowrank.data.recipe import Recipe
from lowrank.errors import DataError, LowrankWarning

REMEDY = "mend the row, say what is trained with --train-on, or leave such rows out with --bad-rows skip"
COUNTS = ("cut", "dropped", "split", "rewritten")  # those that a data set as tokens keeps


@dataclass(slots=True)
class Tally:
    """cut, dropped, split, rewritten: as in `Encoded`; faults: rows that cannot be tokens; long: rows longer than the
    longest length, where that is an error; answers, ended: those of conversations, and those of them that end in a
    special token; rows, paired: those to classify, and those of them with a second text.
    """

    cut: int = 0
    dropped: int = 0
    split: int = 0
    rewritten: int = 0
    faults: Faults = field(default_factory=Faults)
    long: Faults = field(default_factory=Faults)
    answers: int = 0
    ended: int = 0
    rows: int = 0
    paired: int = 0

    def add(self, other: "Tally") -> None:
        """What was found in the part that comes next."""
        for name in (*COUNTS, "answers", "ended", "rows", "paired"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults.join(other.faults)
        self.long.join(other.long)

    def settle(self, data: Dataset, recipe: Recipe) -> None:
        """When all rows were seen. Raises DataError for what is wrong with them as a whole, or warns of rows left
        out."""
        if 0 < self.paired < self.rows:
            raise DataError(f"{data.path}: {self.paired} of {self.rows} rows have a second text; all or none must")
        settle(self.faults, data.bad_rows, REMEDY)
        if self.long.count:
            places = ", ".join(self.long.shown) + (", ..." if self.long.count > len(self.long.shown) else "")
            raise DataError(
                f"{self.long.count:,} rows are longer than {recipe.max_length} tokens ({places}); raise --max-length, "
                "or choose --too-long cut or drop"
            )
        if self.answers and not self.ended:
            raise DataError(
                f"{data.path}: the chat template puts no special token after an answer, so the model would never learn "
                "to stop; give one that does with --chat-template, or a tokenizer with an end token"
            )
        if self.ended < self.answers:
            warnings.warn(
                f"{data.path}: {self.answers - self.ended:,} of {self.answers:,} answers stand in rows where the chat "
                "template puts no special token after one: where those end is not learned",
                LowrankWarning,
                stacklevel=2,
            )
