"""JSON values one after the other in a text that is read in pieces."""

import json
import re
from typing import Any, TextIO

PIECE = 1 << 20  # characters
LONGEST = 1 << 28  # characters of one value: what is no value by then is none
BETWEEN = re.compile(r"[\s,]*")
DECODER = json.JSONDecoder()


class Window:
    """The part of a file that is looked at. text: what was read; at: the place in it; line: the line of that place."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at = file, "", 0
        self.line, self._counted, self._ended = 1, 0, False

    def skip(self) -> bool:
        """Go on to the next value, past blanks and commas; whether there is anything."""
        while True:
            match = BETWEEN.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or not self._more(PIECE):
                self.line += self.text.count("\n", self._counted, self.at)
                self._counted = self.at
                return self.at < len(self.text)

    def value(self) -> tuple[Any, str]:
        """(the value here, its text); the place is behind it then. Raises ValueError or RecursionError.

        What is no value may be the beginning of one: then as much again is read, so that a long value is looked at a
        few times only.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LONGEST or not self._more(max(PIECE, len(self.text) - self.at)):
                    start = self.text.rfind("\n", 0, self.at) + 1  # so that its column is that in the line
                    raise json.JSONDecodeError(error.msg, self.text[start:], error.pos - start) from None
                continue
            if end < len(self.text) or not self._more(PIECE):  # a number at the end may go on
                start, self.at = self.at, end
                return value, self.text[start:end]

    def _more(self, size: int) -> bool:
        """Read on, and let go of what lies behind; whether anything came."""
        if self._ended:
            return False
        found = self.file.read(size)
        self._ended = not found
        if found:
            self.line += self.text.count("\n", self._counted, self.at)
            self.text, self.at, self._counted = self.text[self.at :] + found, 0, 0
        return not self._ended
