"""The text that nano learns to read from: short scenes of a little world, questions about them, and copying.

Every document is made from a seeded generator, so the corpus is a function of its seed. Five kinds, in shares given by
`KINDS`:

    story      six or so sentences about one person, one thing, one place and a friend
    retelling  the same scene in two or three wordings of a sentence or two
    questions  one or two people with their things, then questions and short answers about who has what, where
    word_list  words one to a line, then the same words as a sentence
    echo       words or random characters said twice or more, so that no printable ASCII character is new to the model

No record (`key[value]`) occurs: that is the new skill (`skill.py`). No person is ever given a thing that
`words.held_out` keeps for testing.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lowrank.nano.stories import ANSWERS, ARCS, FACTS, SUMMARIES
from lowrank.nano.words import COLOURS, LOOKS, NAMES, PLACES, PRONOUNS, THINGS, held_out, with_article

Kind = Callable[[random.Random], str]

FORMS: Final = {"she": ("her", "her"), "he": ("his", "him")}
ECHOED: Final = string.digits + string.ascii_letters + string.punctuation
WORDS: Final = THINGS + COLOURS + LOOKS + PLACES + NAMES


@dataclass(frozen=True)
class Person:
    """Someone, and the pronoun that the story uses."""

    name: str
    he: str

    @property
    def his(self) -> str:
        return FORMS[self.he][0]

    @property
    def him(self) -> str:
        return FORMS[self.he][1]


def document(rng: random.Random) -> str:
    """One document of the corpus, without the token that ends it."""
    kinds = tuple(KINDS)
    kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
    return kind(rng)


def person(rng: random.Random) -> Person:
    """Someone of the world; one in five bears an invented name, so that names must be copied and not guessed."""
    he = rng.choice(tuple(PRONOUNS))
    if rng.random() < 0.2:
        return Person("".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in "12").capitalize(), he)
    return Person(rng.choice(PRONOUNS[he]), he)


def scene(rng: random.Random, owner: Person, friend: Person) -> dict[str, str]:
    """The words that a story template is filled with: who has which thing, how it looks, and where it is."""
    thing = rng.choice([thing for thing in THINGS if not (held_out(owner.name, thing) or held_out(friend.name, thing))])
    colour, look = rng.choice(COLOURS), rng.choice(LOOKS)
    described = rng.choice((f"{colour} {thing}", f"{look} {colour} {thing}"))
    return {
        "name": owner.name,
        "He": owner.he.capitalize(),
        "he": owner.he,
        "his": owner.his,
        "him": owner.him,
        "friend": friend.name,
        "Friend_he": friend.he.capitalize(),
        "thing": thing,
        "colour": colour,
        "a_colour": with_article(colour),
        "a_look": with_article(look),
        "a_thing": with_article(described),
        "place": rng.choice(PLACES),
    }


def story(rng: random.Random) -> str:
    """One arc, each of its sentences in one of several wordings, and half of the time one sentence that sums it up."""
    words = scene(rng, *_two(rng))
    sentences = [rng.choice(wordings) for wordings in rng.choice(ARCS)]
    told = " ".join(sentences).format_map(words)
    return told if rng.random() < 0.5 else f"{told}\n{rng.choice(SUMMARIES).format_map(words)}"


def retelling(rng: random.Random) -> str:
    """The same scene in two or three wordings."""
    words = scene(rng, *_two(rng))
    return "\n".join(wording.format_map(words) for wording in rng.sample(SUMMARIES, rng.randint(2, 3)))


def questions(rng: random.Random) -> str:
    """One or two people and what they have, in prose, then three questions with short answers."""
    one, other = _two(rng)
    scenes = [scene(rng, one, other), scene(rng, other, one)][: rng.randint(1, 2)]
    if any(scenes[0][key] == scenes[-1][key] for key in ("thing", "colour", "place")) and len(scenes) == 2:
        return questions(rng)
    facts = [rng.choice(FACTS).format_map(words) for words in scenes]
    asked = rng.sample([(q.format_map(words), a.format_map(words)) for words in scenes for q, a in ANSWERS], 3)
    return " ".join(facts) + "".join(f"\nQ: {question}\nA: {answer}" for question, answer in asked)


def word_list(rng: random.Random) -> str:
    """A list of words of all kinds, one to a line, and the sentence that says them again."""
    who = person(rng)
    words = rng.sample(WORDS, rng.randint(2, 8))
    items = "\n".join(words)
    return f"{who.name} writes a list:\n{items}\n{who.name} says: {', '.join(words[:-1])} and {words[-1]}."


def echo(rng: random.Random) -> str:
    """A run of words or of random characters in quotes, said twice or three times."""
    if rng.random() < 0.6:
        said = " ".join(rng.sample(WORDS, rng.randint(3, 16)))
    else:
        said = " ".join("".join(rng.choices(ECHOED, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 6)))
    voices = [f'{person(rng).name} says: "{said}"' for _ in range(rng.randint(2, 3))]
    return "\n".join(voices)


def _two(rng: random.Random) -> tuple[Person, Person]:
    one, other = person(rng), person(rng)
    return (one, other) if one.name != other.name else _two(rng)


KINDS: Final[dict[Kind, float]] = {
    story: 0.25,
    retelling: 0.25,
    questions: 0.35,
    word_list: 0.08,
    echo: 0.07,
}
