"""Expressions from files: what `re` says of a name, and an end to it for every one."""

import random
import re
import warnings

import pytest

import lowrank
from lowrank import LoraConfig
from lowrank.errors import ConfigError
from lowrank.injection.patterns import check_patterns, layer_index, matches, pattern_value
from lowrank.injection.regex import Table
from models import MODELS

PIECES = [*"ab.0^$-{_", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", r"\b", "ab", "a.b", r"\W", r"[\w.]", r"\-", "a{"]
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?", "+?", "??"]


def expression(depth: int, dice: random.Random) -> str:
    """Any expression of the kinds that are read here."""
    kind = dice.random()
    if depth == 0 or kind < 0.35:
        return dice.choice(PIECES)
    inner = expression(depth - 1, dice)
    if kind < 0.6:
        return inner + expression(depth - 1, dice)
    if kind < 0.75:
        return f"({inner}|{expression(depth - 1, dice)})"
    if kind < 0.9:
        return f"{dice.choice(['(?:', '(', '(?P<n>'])}{inner}){dice.choice(REPEATS)}"
    if kind < 0.94:
        return f"{dice.choice(['(?=', '(?!'])}{inner})"
    if kind < 0.97:
        return f"{dice.choice(['(?<=', '(?<!'])}{dice.choice(PIECES[:3])})"
    return f"{inner}|{expression(depth - 1, dice)}"


def test_the_same_answers_as_re() -> None:
    dice, met = random.Random(1), {True: 0, False: 0}
    for _ in range(1500):
        text = expression(4, dice)
        if text.count("?P<n>") > 1:
            continue  # re wants another name for each
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole, ending = re.compile(text), re.compile(rf"(.*\.)?({text})$")
        table = Table([text])
        for _ in range(6):
            name = "".join(dice.choice("ab.0_1c-" + "\n" * (dice.random() < 0.1)) for _ in range(dice.randrange(9)))
            wanted = bool(whole.fullmatch(name)), bool(ending.match(name))
            got = table.first(name, whole=True) is not None, table.first(name, whole=False) is not None
            assert got == wanted, (text, name)
            met[wanted[1]] += 1
    assert min(met.values()) > 500


def test_the_first_of_many_wins_as_in_peft() -> None:
    dice = random.Random(2)
    for _ in range(200):
        keys = [expression(2, dice) for _ in range(8)]
        if any("?P<n>" in key for key in keys):
            continue
        for _ in range(6):
            name = "".join(dice.choice("ab.0_1c") for _ in range(dice.randrange(1, 8)))
            wanted = next((n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name)), None)
            assert Table(keys).first(name, whole=False) == wanted, (keys, name)


BROKEN = ["(", ")", "a)", "[", "[]", "*", "a**", "a++", "(?", "(?i)a", r"(a)\1", "(?P=n)", "(?>a)", "a{3,1}"]
BROKEN += ["a{999}", "(a{200}){200}", "((a{50}){50}){50}", "(?(1)a|b)", "[a", "[" + chr(92), "x{99999999}", r"\q"]
BROKEN += ["(" * 5000 + "a" + ")" * 5000, "[z-a]", chr(92), "a" * 3_000_000, "(a|b.*c)" * 2000]


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:12])
def test_what_is_none_or_cannot_be_bounded_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        matches("model.q_proj", text, "target_modules")
    said = str(caught.value)
    assert said.startswith("target_modules=") and "\n" not in said and len(said) < 500


HOSTILE = [r"((\w|\.)+)+!", "(a*)*b", "(.*.*)*x", "((.|..)*.*)*!", "(?:(?:a|aa)+)+$!", r"(.*)*(.*)*(.*)*\d!"]
HOSTILE += [
    "(x+x+)+y",
    f"({'|'.join('.' * n for n in range(1, 40))})*!",
    "(?!(a+)+b)" * 20 + "(a+)+!",
    "(((((a*)*)*)*)*)*!",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:16])
def test_every_expression_comes_to_an_end(text: str) -> None:
    """`re` would take longer than the age of the world for most of these."""
    for name in ("model.layers.0.self_attn.q_proj", "a" * 1000, "a." * 500):
        assert not matches(name, text, "target_modules")
        assert pattern_value(name, {text: 1}, 0, "rank_pattern") == 0
        LoraConfig(target_modules=text, rank_pattern={text: 2})


def test_steps_are_counted_and_end() -> None:
    """A whole model of the longest names and an expression of the largest size: refused, not waited for."""
    text = "(" + "|".join(f".{{{n}}}" for n in range(1, 60)) + ")*!"
    with pytest.raises(ConfigError, match="takes too many steps"):
        for number in range(4000):
            pattern_value("a" * 990 + str(number), {text: 1}, 0, "rank_pattern")


def test_thousands_of_keys_on_thousands_of_modules() -> None:
    """Looked up, not tried: 4 million pairs."""
    paths = [f"model.layers.{n // 7}.mlp.part_{n % 7}" for n in range(2000)]
    table = {path: n for n, path in enumerate(paths)}
    assert all(pattern_value(path, table, -1, "rank_pattern") == n for n, path in enumerate(paths))
    escaped = {"^" + re.escape(path): n for n, path in enumerate(paths)}
    assert all(pattern_value(path, escaped, -1, "rank_pattern") == n for n, path in enumerate(paths))
    whole = "|".join(map(re.escape, paths))
    assert all(matches(path, whole, "target_modules") for path in paths)
    assert not matches("model.layers.0.mlp", whole, "target_modules")
    check_patterns("ranks", table, paths)


def test_expressions_as_people_write_them() -> None:
    unsloth = (
        r"(?:.*?(?:vision|image|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
    )
    swift = r"^(language_model|model)(?!.*(lm_head|output|visual)).*"
    assert matches("model.layers.11.self_attn.q_proj", unsloth, "target_modules")
    assert not matches("model.layers.11.self_attn.o_proj", unsloth, "target_modules")
    assert matches("model.layers.0.mlp.up_proj", swift, "target_modules")
    assert not matches("model.visual.blocks.0.mlp.up_proj", swift, "target_modules")


def test_numbers_of_layers() -> None:
    assert layer_index("model.layers.3.experts.0.up", None) == 3
    assert layer_index("model.layers.3.experts.0.up", "experts") == 0
    assert layer_index("layers.3", None) is None
    for odd in ("²", "9" * 5000, "٣"):
        layer_index(f"layers.{odd}.q_proj", None)
    assert layer_index("layers.0.q", ["("]) is None


def test_a_hostile_target_is_answered_by_a_plan() -> None:
    with pytest.raises(lowrank.errors.TargetError, match=r"matches (no module|none)"):
        lowrank.plan(MODELS["llama"](), LoraConfig(r=2, target_modules=r"(\w+\.?)+!"))
