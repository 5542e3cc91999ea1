"""Small readings of what is typed on a command line: names and pairs with commas, and \\n for a new line."""

import re
from collections.abc import Iterator, Mapping

NAME = r"[\w.-]+(?:\[[\w, ]+\])?"
NAMES = re.compile(rf"\s*{NAME}(?:\s*,\s*{NAME})*\s*")
PAIR = re.compile(r"\s*([^\s].*?)\s*=\s*([^=,(){}]+?)\s*(?:,|$)")  # commas and = may be part of an expression


def split_names(value: object) -> object:
    """ "a,b" as ("a", "b"); commas in brackets belong to a fused selector: "c_attn[q,v],c_proj" is two names."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(re.findall(NAME, value))
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(name for item in value for name in re.findall(NAME, item))
    return value


def split_tokens(value: object) -> object:
    """ "<a>,<b>" as ("<a>", "<b>"): whatever stands between commas."""
    every = [value] if isinstance(value, str) else value
    if isinstance(every, list | tuple) and all(isinstance(item, str) for item in every):
        return tuple(token for item in every for token in item.split(",") if token)
    return every


def split_pairs(value: object) -> object:
    """ "a=1,b=2" as {"a": "1", "b": "2"}; {"a": {"b": 1}}, the parser's word for --flag.a.b 1, as {"a.b": 1}."""
    if isinstance(value, Mapping):
        return dict(_flat(value))
    if not isinstance(value, str):
        return value
    pairs: dict[str, str] = {}
    at = 0
    while at < len(value):
        found = PAIR.match(value, at)
        if found is None:
            raise ValueError("give NAME=VALUE, several with commas")
        if found[1] in pairs:
            raise ValueError(f"{found[1]!r} stands there twice")
        pairs[found[1]] = found[2]
        at = found.end()
    return pairs


def _flat(nested: Mapping[object, object], start: str = "") -> Iterator[tuple[object, object]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{name}.")
        else:
            yield (f"{start}{name}" if start else name), value


def read_targets(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """`--targets` as LoraConfig takes it: names with commas become a list, anything else is one regular expression."""
    if not isinstance(value, str) or value == "all-linear" or not NAMES.fullmatch(value):
        return value
    return tuple(re.findall(NAME, value))


def unescape(value: object) -> object:
    """A shell passes \\n as two characters; nobody means those in a template."""
    return whole(value.replace("\\n", "\n").replace("\\t", "\t")) if isinstance(value, str) else value


def texts(value: object) -> object:
    """One text as a tuple of one; each without halves of characters, and \\n in it a new line."""
    every = [value] if isinstance(value, str) else value
    return tuple(unescape(item) for item in every) if isinstance(every, list | tuple) else every


def whole(value: object) -> object:
    """Text without halves of characters, which no tokenizer takes: a shell passes a byte that is not UTF-8 as one."""
    if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise ValueError("holds a byte that is not UTF-8, or half a character")
    return value
