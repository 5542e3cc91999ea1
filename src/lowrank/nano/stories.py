"""The sentences of nano's world: arcs of stories, one-sentence summaries, and questions, as templates over a scene."""

from typing import Final

FACTS: Final = (
    "{name} has {a_thing} in the {place}.",
    "{name} has {a_thing}. {He} keeps it in the {place}.",
    "{name} keeps {a_thing} in the {place}.",
    "In the {place}, {name} has {a_thing}.",
    "There is {a_thing} in the {place}. It belongs to {name}.",
    "The {colour} {thing} in the {place} belongs to {name}.",
)

SUMMARIES: Final = (
    *FACTS,
    "{name} is in the {place} with {friend}. {He} has {a_thing}.",
    "{name} has {a_thing} in the {place} with {friend}.",
    "{name} and {friend} are in the {place}. {name} has {a_thing}.",
)

ANSWERS: Final = (
    ("Who has the {thing}?", "{name}"),
    ("Who is the owner of the {thing}?", "{name}"),
    ("What does {name} have?", "{a_colour} {thing}"),
    ("What colour is the {thing}?", "{colour}"),
    ("What is {colour}?", "the {thing}"),
    ("Where is the {thing}?", "in the {place}"),
    ("What is in the {place}?", "the {thing}"),
)

_MORNINGS: Final = (
    "One morning {name} goes to the {place}.",
    "It is a sunny day, and {name} is in the {place}.",
    "{name} wakes up early and walks to the {place}.",
    "It rains all day, so {name} stays in the {place}.",
    "Every day {name} plays in the {place}.",
)
_OWNS: Final = (
    "{He} has {a_thing}.",
    "{He} has {a_thing} with {him}.",
    "{He} carries {a_thing}.",
    "In {his} hands {he} holds {a_thing}.",
)
_FRIEND_COMES: Final = (
    "{friend} comes to the {place} too.",
    "Then {friend} comes along and says hello.",
    "Soon {his} friend {friend} is there.",
    "After a while {he} meets {friend}.",
)
_ENDS_WELL: Final = (
    "They are both very happy.",
    "In the evening they walk home together.",
    "They laugh and play until dark.",
    "What a good day it was!",
    "{name} and {friend} are good friends.",
)

ARCS: Final[tuple[tuple[tuple[str, ...], ...], ...]] = (
    (  # lost and found
        _MORNINGS,
        _OWNS,
        (
            "But then the {thing} is gone.",
            "Suddenly {he} cannot find the {thing}.",
            "Oh no, the {colour} {thing} is lost!",
        ),
        ("{name} looks everywhere.", "{He} looks left and right.", "{name} is sad and begins to cry."),
        _FRIEND_COMES,
        (
            "{friend} finds the {thing} under a tree.",
            "{friend} has seen the {colour} {thing} and brings it back.",
            "Together they find the {colour} {thing}.",
        ),
        _ENDS_WELL,
    ),
    (  # a present
        ("Today is a big day for {name}.", "It is {name}'s birthday.", "{name} is waiting for {friend}."),
        _FRIEND_COMES,
        (
            "{friend} brings {a_thing}.",
            "{friend} gives {name} {a_thing}.",
            "{Friend_he} has a present: it is {a_thing}.",
        ),
        ('"Thank you, {friend}!" says {name}.', '"I love it," says {name}.', '"What {a_look} {thing}!" says {name}.'),
        (
            "{name} takes the {thing} to the {place}.",
            "{He} puts the {colour} {thing} in the {place}.",
            "Now the {thing} is in the {place}.",
        ),
        _ENDS_WELL,
    ),
    (  # sharing
        _MORNINGS,
        _OWNS,
        _FRIEND_COMES,
        (
            '"May I have the {thing}?" asks {friend}.',
            '"Is that your {thing}?" asks {friend}.',
            '"Where did you get the {colour} {thing}?" asks {friend}.',
        ),
        (
            '"Yes, we can share it," says {name}.',
            '"It is my {thing}, but you can hold it," says {name}.',
            '"My mother gave it to me," says {name}.',
        ),
        _ENDS_WELL,
    ),
    (  # found
        _MORNINGS,
        ("There {he} finds {a_thing}.", "Behind a door {he} sees {a_thing}.", "In the corner there is {a_thing}."),
        (
            '"Whose {thing} is this?" asks {name}.',
            "{name} does not know whose {thing} it is.",
            "{He} asks everyone about the {colour} {thing}.",
        ),
        (
            "Nobody knows, so {he} keeps it.",
            "It is {friend}'s {thing}, and {friend} thanks {him}.",
            "{friend} says that {name} may keep the {thing}.",
        ),
        ("{He} is proud of {his} {thing}.", "That makes {him} smile.", "{He} goes home with a song."),
    ),
    (  # mending
        (
            "{name} has {a_thing}, but it is broken.",
            "The {colour} {thing} of {name} is broken.",
            "{name} drops {a_thing} and it breaks.",
        ),
        (
            "{He} takes it to the {place}.",
            "{He} brings the {thing} to {friend} in the {place}.",
            "In the {place} {he} asks {friend} for help.",
        ),
        ("{friend} works all day.", "{friend} takes some glue and some string.", "{friend} knows what to do."),
        (
            "Now the {thing} is as good as new.",
            "In the evening the {colour} {thing} is whole again.",
            "At last the {thing} works.",
        ),
        _ENDS_WELL,
    ),
)
