"""Captions and prompts: templates and how they are filled, the paper's evaluation prompts, its applications.

A template holds `{identifier}` and `{class}`, or `{subject}` for both together; `[trigger]`, ai-toolkit's placeholder,
is the identifier. Everything else in it is literal: no article is added or changed.
"""

import re

from dbtrain.errors import ConfigError

_PLACE = re.compile(r"\{(\w*)\}|\[trigger\]")

_BOTH = """
    in the jungle | in the snow | on the beach | on a cobblestone street | on top of pink fabric
    on top of a wooden floor | with a city in the background | with a mountain in the background
    with a blue house in the background | on top of a purple rug in a forest
"""
_OBJECT = """
    with a wheat field in the background | with a tree and autumn leaves in the background
    with the Eiffel Tower in the background | floating on top of water | floating in an ocean of milk
    on top of green grass with sunflowers around it | on top of a mirror
    on top of the sidewalk in a crowded street | on top of a dirt road | on top of a white rug
"""
_LIVE = """
    wearing a red hat | wearing a santa hat | wearing a rainbow scarf | wearing a black top hat and a monocle
    in a chef outfit | in a firefighter outfit | in a police outfit | wearing pink glasses | wearing a yellow shirt
    in a purple wizard outfit
"""
_PROPERTIES = ("red", "purple", "shiny", "wet", "cube shaped")


def _prompts(*tables: str) -> tuple[str, ...]:
    scenes = [scene.strip() for table in tables for scene in re.split(r"[|\n]", table) if scene.strip()]
    return (*(f"a {{subject}} {scene}" for scene in scenes), *(f"a {word} {{subject}}" for word in _PROPERTIES))


OBJECT_PROMPTS = _prompts(_BOTH, _OBJECT)
"""The 25 prompts for objects of google/dreambooth (CC BY 4.0): 20 recontextualizations, 5 property changes."""
LIVE_PROMPTS = _prompts(_BOTH, _LIVE)
"""The 25 prompts for live subjects: 10 recontextualizations, 10 accessories, 5 property changes."""

_LIVE_CLASSES = """
    cat dog
    baby bear bird boy child cow deer duck elephant fish fox frog girl goat hamster horse kitten lion lizard man
    monkey owl panda parrot penguin person pig puppy rabbit sheep snake squirrel tiger toddler turtle wolf woman
"""
LIVE_CLASSES = frozenset(_LIVE_CLASSES.split())
"""Class nouns of live subjects: the data set's two, then common others."""

APPLICATIONS = {
    "recontextualization": ("a {subject} in the jungle", "a {subject} in the snow", "a {subject} on the beach"),
    "views": tuple(f"a {{subject}} seen from the {side}" for side in ("top", "bottom", "side", "back")),
    "properties": tuple(f"a {word} {{subject}}" for word in _PROPERTIES) + ("a cross of a {subject} and a panda",),
    "accessories": ("a {subject} in a chef outfit", "a {subject} wearing a santa hat"),
    "art": tuple(f"a painting of a {{subject}} in the style of {name}" for name in ("Van Gogh", "Vermeer", "Hokusai")),
}
"""Prompts for what a personalized model should be able to do (DreamBooth, section 4.4), by application."""


def prompt_set(class_noun: str) -> tuple[str, ...]:
    """The paper's 25 evaluation prompts for a class, as templates with `{subject}`."""
    words = class_noun.casefold().split()
    return LIVE_PROMPTS if words and words[-1] in LIVE_CLASSES else OBJECT_PROMPTS


def subject_phrase(identifier: str | None, class_noun: str) -> str:
    """What `{subject}` stands for: identifier and class noun; the class noun alone where identifier is None."""
    return f"{identifier} {class_noun}" if identifier else class_noun


def fill(template: str, *, identifier: str | None = None, class_noun: str) -> str:
    """The template with its placeholders filled in. Without an identifier `{subject}` is any member of the class.

    Raises ConfigError for an unknown placeholder, and for `{identifier}` or `[trigger]` when there is no identifier.
    """
    values = {"identifier": identifier, "class": class_noun, "subject": subject_phrase(identifier, class_noun)}

    def value(place: re.Match[str]) -> str:
        name = "identifier" if place[1] is None else place[1]
        if name not in values:
            raise ConfigError(f"caption or prompt {template!r}: unknown placeholder {place[0]}, "
                              "want {identifier}, {class}, {subject} or [trigger]")
        filled = values[name]
        if filled is None:
            raise ConfigError(f"caption or prompt {template!r}: {place[0]} has no value, because the class as such "
                              "has no identifier; use {class} or {subject}")
        return filled

    return _PLACE.sub(value, template)
