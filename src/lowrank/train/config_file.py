"""Flag beats YAML beats default; an unknown name is an error that says what was perhaps meant."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lowrank.data.settings import Settings
from lowrank.errors import ConfigError
from lowrank.train.foreign_names import near, ours

S = TypeVar("S", bound=Settings)
MOST_BYTES = 1_000_000
EXCLUSIVE = (("steps", "epochs"), ("eval_data", "eval_split"))  # a flag for one beats the other in a file


def resolve(kind: type[S], flags: Mapping[str, object], file: str | Path | None = None) -> S:
    """The settings of type `kind`, from the flags that were given, then the YAML file, then the defaults.

    Raises ConfigError with every fault at once.
    """
    written = read_yaml(file, kind) if file is not None else {}
    for one, other in (*EXCLUSIVE, *map(reversed, EXCLUSIVE)):
        if one in flags:
            written.pop(other, None)
    return check(kind, {**written, **flags}, str(file) if file is not None else None)


def read_yaml(file: str | Path, kind: type[Settings]) -> dict[str, object]:
    """The settings a YAML file holds; every name in it must be one of `kind`'s."""
    import yaml

    path = Path(file)
    if path.exists() and not path.is_file():
        raise ConfigError(f"config {file} is no file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"config {file} has {path.stat().st_size:,} bytes: that is no file of settings")
        content = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {file}: {error.strerror or error}") from None
    except RecursionError:
        raise ConfigError(f"config {file} is nested too deep for a file of settings") from None
    except (yaml.YAMLError, ValueError) as error:  # no UTF-8, a date that is none
        raise ConfigError(f"config {file} is not YAML: {_yaml_fault(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config {file} must hold lines of `name: value`, not one {type(content).__name__}")
    unknown = [str(name) for name in content if not isinstance(name, str) or name not in kind.model_fields]
    if unknown:
        raise ConfigError(f"config {file}: " + "; ".join(_unknown(name, kind) for name in unknown))
    return content


def _parsed(text: str) -> object:
    """The YAML's value. A name that stands there twice is a fault, as a flag given twice is."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            if twice := next((name for name in names if isinstance(name, str) and names.count(name) > 1), None):
                raise yaml.YAMLError(f"{twice!r} stands there twice")
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)  # a SafeLoader


def _yaml_fault(error: Exception) -> str:
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())


def check(kind: type[S], values: Mapping[str, object], file: str | None = None) -> S:
    """`kind(**values)`, with pydantic's faults put into one sentence."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        where = f" (flags, or {file})" if file else ""
        raise ConfigError(sentence(error, kind) + where) from None


def sentence(error: ValidationError, kind: type[Settings]) -> str:
    """Every fault pydantic found, as one sentence in the words of the command line."""
    first: dict[Any, Any] = {}  # of a value that may be of several types, each refuses it
    for fault in error.errors():
        first.setdefault(fault["loc"][:1] or fault["msg"], fault)
    return "; ".join(_fault(fault, kind) for fault in first.values())


def _unknown(name: str, kind: type[Settings]) -> str:
    if meant := ours(name, kind.model_fields):
        return f"{name!r} is no setting: here it is called {meant!r}"
    meant = near(name, kind.model_fields)
    return f"{name!r} is no setting" + (f", did you mean {meant!r}?" if meant else "")


def _fault(fault: Any, kind: type[Settings]) -> str:
    name = str(fault["loc"][0]) if fault["loc"] else ""
    flag = "--" + name.replace("_", "-")
    if fault["type"] == "missing":
        return f"{flag} is needed: {kind.model_fields[name].description}"
    if fault["type"] == "extra_forbidden":
        return _unknown(name, kind)
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{flag}: {message[:1].lower()}{message[1:]}, not {fault['input']!r}" if name else message
