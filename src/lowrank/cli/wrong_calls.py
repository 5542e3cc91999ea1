"""A call that cannot be parsed, told in one sentence."""

from collections.abc import Collection, Iterator, Sequence

from cyclopts import App, CycloptsError, MissingArgumentError, UnknownOptionError, UnusedCliTokensError
from cyclopts.exceptions import UnknownCommandError

from lowrank.errors import ConfigError
from lowrank.train.foreign_names import COMMANDS, near, ours

PATHS = ("--out", "--model", "--data", "--adapter", "--config", "--html", "--against", "--tuned", "--source", "--ranks")


def check_values(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an empty path (an unset variable of the shell, pathlib's word for "here"), and for --a.b
    beside --a.b.c, at which the parser breaks: it would make a value and a table of one.
    """
    for flag, value in zip(arguments, [*arguments[1:], None], strict=True):
        name, given, behind = flag.partition("=")
        if name in PATHS and (behind if given else value) == "":
            raise ConfigError(f"{name} is empty: give a path")
    dotted = {flag.partition("=")[0] for flag in arguments if flag.startswith("--") and "." in flag}
    for long in dotted:
        if short := next((one for one in dotted if long.startswith(one + ".")), None):
            raise ConfigError(f"{short} and {long}: give both as {short.partition('.')[0]} NAME=VALUE,NAME=VALUE")


def wrong_call(error: CycloptsError, app: App, arguments: Sequence[str], commands: Collection[str]) -> str:
    """The sentence for the error that `app` raised for `arguments`; commands: the names there are."""
    from pydantic import ValidationError

    if isinstance(error.__cause__, ValidationError):
        from lowrank.train.config_file import sentence
        from lowrank.train.settings import TrainSettings

        return sentence(error.__cause__, TrainSettings)
    if isinstance(error, UnknownCommandError):
        return _unknown_command(arguments[0], commands)
    if isinstance(error, UnknownOptionError | MissingArgumentError):
        command = arguments[0]
        known = set(_flags(app[command]))
        if unknown := next(_unknown(arguments[1:], known), None):
            return _unknown_flag(unknown, command, known)
        if isinstance(error, MissingArgumentError) and error.argument and not error.tokens_so_far:
            return _missing(error, command)
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or ())}: every value needs its flag in front; --help lists them"
    return " ".join(str(error).split())


def _unknown_command(name: str, commands: Collection[str]) -> str:
    meant = COMMANDS.get(name) or near(name, commands)
    if meant:
        return f"there is no command {name!r}, did you mean `lowrank {meant}`?"
    return f"there is no command {name!r}, only {', '.join(commands)}; `lowrank --help` says what they do"


def _unknown(arguments: Sequence[str], known: set[str]) -> Iterator[str]:
    """The flags among the arguments that the command has not."""
    for argument in arguments:
        name = argument.partition("=")[0]
        start = name.partition(".")[0]  # of --rank-pattern.q_proj
        if name.startswith("--") and start not in known and f"--{start.removeprefix('--no-')}" not in known:
            yield name


def _unknown_flag(flag: str, command: str, known: set[str]) -> str:
    name, names = _setting(flag), [_setting(one) for one in sorted(known)]
    start = f"`lowrank {command}` has no {flag}"
    if meant := ours(name, names):
        return f"{start}: here it is called {_flag(meant)}"
    if meant := near(name, names):
        return f"{start}, did you mean {_flag(meant)}?"
    return f"{start}; `lowrank {command} --help` lists what there is"


def _missing(error: MissingArgumentError, command: str) -> str:
    assert error.argument is not None
    name = error.argument.name
    given = error.unused_tokens is not None and name in (error.root_input_tokens or ())
    if given:
        return f"{name} requires an argument"
    described = str(error.argument.parameter.help or "").partition(";")[0]
    return f"{name} is needed: {described}" if described else f"{name} is needed; see `lowrank {command} --help`"


def _flags(app: App) -> Iterator[str]:
    for argument in app.assemble_argument_collection():
        yield from (name for name in argument.names if name.startswith("--"))
    yield from ("--help", "--version")


def _setting(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
