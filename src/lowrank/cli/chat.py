"""`lowrank generate --chat`: turns read from the terminal, or line by line from a pipe, answered word by word."""

import sys
from collections.abc import Iterator
from contextlib import suppress

from lowrank.cli.console import stream
from lowrank.cli.pulse import muted
from lowrank.cli.say import say
from lowrank.cli.signals import Ended
from lowrank.errors import LowrankError, short
from lowrank.train.settings import GenerateSettings
from lowrank.train.talk import Talk

EXIT, CLEAR = ("/exit", "/quit"), "/clear"
PROMPT = "> "


def converse(settings: GenerateSettings) -> None:
    """Talk until the input ends or says /exit. On a terminal Ctrl-C ends an answer, and an error only its turn."""
    talk = Talk(settings)
    alone = not sys.stdin.isatty()
    with muted():
        if not alone:
            print("/clear forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer", file=sys.stderr)
        for text in _lines(alone):
            if text in EXIT:
                return
            if text == CLEAR:
                talk.clear()
            elif alone:
                _answer(talk, text)
            else:
                _spared(talk, text)


def _answer(talk: Talk, text: str) -> None:
    with stream() as on_text:
        talk.answer(text, on_text)


def _spared(talk: Talk, text: str) -> None:
    """The answer; what goes wrong with it, or ends it, does not end the conversation."""
    try:
        _answer(talk, text)
    except LowrankError as error:
        print(f"lowrank: error: {short(error, 2000)}", file=sys.stderr)
    except KeyboardInterrupt as stopped:
        if isinstance(stopped, Ended):
            raise
        say("")


def _lines(piped: bool) -> Iterator[str]:
    """What is said, without blank lines: from a pipe, or typed, with the keys that readline knows where it is there."""
    if piped:
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8-sig", errors="replace")
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401  input() uses it once it is imported
    stopped = False
    while True:
        try:
            text = input(PROMPT).strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt as asked:  # meant for an answer that ended a moment ago, unless it comes again
            if stopped or isinstance(asked, Ended):
                raise
            stopped = True
            say("")
            print("once more, /exit or Ctrl-D ends", file=sys.stderr)
            continue
        stopped = False
        if text:
            yield text
