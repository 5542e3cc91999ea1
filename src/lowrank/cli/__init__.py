"""The command line: `lowrank COMMAND`. A command is imported when it is called, so `lowrank --help` costs no torch.

To add one: a module with `command = App(name=...)` and its default function, and a line in COMMANDS.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from signal import Signals

from cyclopts import App, CycloptsError, Parameter

from lowrank import launch
from lowrank.cli.last_net import caught
from lowrank.cli.pulse import pulsing
from lowrank.cli.several import tells_the_end
from lowrank.cli.signals import Ended, unwinding
from lowrank.cli.streams import say_anything
from lowrank.cli.wrong_calls import check_values, wrong_call
from lowrank.errors import LowrankError, LowrankWarning, ProcessLost, Stopped, short

COMMANDS = {
    "demo": "The whole story in a minute, offline: teach a small decoder a skill, merge it, prove the merge.",
    "train": "Teach a model from a file of examples, and save the adapter.",
    "data": "See what a data file becomes: which tokens are trained, how long rows are, what is cut.",
    "init": "Write a file of all settings of a training, with what they mean.",
    "plot": "Draw the loss of one or several runs, with their evaluations.",
    "eval": "Measure a model, with or without an adapter, on a file of examples.",
    "generate": "Let a model write, with or without an adapter.",
    "dimension": "Measure how few numbers a task needs: its intrinsic dimension, d90.",
    "rank": "Say which rank each module needs, from the gradient before training or from an adapter after it.",
    "inspect": "Measure what an adapter learned: spectra and ranks, beside its base or another adapter.",
    "merge": "Merge adapters into a checkpoint on disk, without building the model.",
    "combine": "Make one adapter from several: their exact sum, or TIES, DARE and pruned merges.",
    "extract": "Make an adapter of what a tuned checkpoint has beyond its base.",
    "resize": "Give an adapter another rank.",
    "convert": "Write an adapter in another program's format: mlx-lm, GGUF, vLLM, SGLang, loralib, old pickles.",
    "estimate": "Say what a training will take, memory by kind and time, before a weight is loaded.",
    "doctor": "What is installed, what runs fast here, and how a model's layers would be computed.",
}
MODULES = {"eval": "evaluate"}  # where a module cannot be called as its command is

FAILED, WRONG_CALL, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
OUT_OF_TIME = 75  # sysexits' word for what may be tried again
LONGEST = 400  # characters of a message


def make_app() -> App:
    """The parser of all commands, none of them imported yet."""
    app = App(
        name="lowrank",
        help="Adapt a pretrained model by a low-rank change of its weights (LoRA), measure it, merge it, ship it.",
        help_format="plaintext",
        version=lambda: version("lowrank"),
        default_parameter=Parameter(negative_iterable=(), show_default=_shown_default),
        suppress_keyboard_interrupt=False,
    )
    for name, help_text in COMMANDS.items():
        app.command(f"lowrank.cli.{MODULES.get(name, name)}:command", name=name, help=help_text)
    return app


def _shown_default(value: object) -> str | None:
    """What a flag is where it is not given; nothing for a switch that is off and a list that is empty."""
    return str(value) if value or isinstance(value, float) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (from sys.argv where no arguments are given) and return the exit status.

    0: done; 2: a wrong call or input, one sentence on stderr; 1: something that nobody foresaw, one sentence too;
    130: interrupted; 141: the reader of stdout is gone; 143, 129: ended by SIGTERM, or by the SIGHUP of a terminal;
    75: a training whose time was up, to be gone on with.
    """
    say_anything()
    try:
        with unwinding(), _warnings_as_lines(), pulsing():
            _answer(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except LowrankError as error:
        return _complain(str(error), lost=isinstance(error, ProcessLost))
    except Stopped as stopped:
        return _end(f"lowrank: {_line(stopped)}", OUT_OF_TIME if stopped.number is None else 128 + stopped.number)
    except Ended as ended:
        return _end(f"lowrank: ended by {Signals(ended.number).name}", 128 + ended.number)
    except KeyboardInterrupt:
        return _end("lowrank: interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}")
    except Exception as error:
        return _complain(caught(error), FAILED)
    return 0


def _answer(arguments: list[str]) -> None:
    check_values(arguments)
    app = make_app()
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise LowrankError(wrong_call(error, app, arguments, tuple(COMMANDS))) from None


def _complain(text: str, status: int = WRONG_CALL, lost: bool = False) -> int:
    return _end(f"lowrank: error: {_line(text)}", status, lost)


def _end(line: str, status: int, lost: bool = False) -> int:
    if tells_the_end(lost):
        print(line, file=sys.stderr)
    return status


def _line(text: object) -> str:
    """One line of bounded length, whatever names from files and arguments are in it."""
    return short(text, LONGEST)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Our warnings as one line each on stderr, without the place in the code; all others as ever."""
    with warnings.catch_warnings():
        usual: Callable[..., None] = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
            if not launch.is_first():
                return  # the first process has it too
            if issubclass(category, LowrankWarning):
                print(f"lowrank: warning: {_line(message)}", file=sys.stderr)
            else:
                usual(message, category, filename, lineno, *rest)

        warnings.showwarning = show  # type: ignore[assignment]
        warnings.simplefilter("always", LowrankWarning)
        yield
