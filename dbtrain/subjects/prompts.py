"""Captions and prompts: templates and how they are filled, the paper's evaluation prompts, its applications.

A template holds `{identifier}` and `{class}`, or `{subject}` for both together; `[trigger]`, ai-toolkit's placeholder,
is the identifier. The rest of a template stays as it is: no article is added or changed. Other braces are those of
JSON, as Ideogram 4 is told pictures: a quote begins what is in them. The sets are files in `configs/prompts`. In them
`paper` holds the prompts of google/dreambooth, and `more` others. In both, `all` is for every class, `live` and
`object` for one kind of class.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

import yaml

from dbtrain.errors import ConfigError, first_line
from dbtrain.settings import yaml12
from dbtrain.settings.config import NAMING
from dbtrain.settings.recipes import configs_dir

PLACES = re.compile(r"\{(identifier|class|subject)\}|\[trigger\]")
"""The placeholders of captions and prompts."""
_ODD = re.compile(r'\{(?!\s*"|(?:identifier|class|subject)\})(?:[^{}]|\{[^{}]*\})*\}?')
_LIVE_CLASSES = """
    cat dog
    baby bear bird boy child cow deer duck elephant fish fox frog girl goat hamster horse kitten lion lizard man
    monkey owl panda parrot penguin person pig puppy rabbit sheep snake squirrel tiger toddler turtle wolf woman
"""
LIVE_CLASSES = frozenset(_LIVE_CLASSES.split())
"""Class nouns of live subjects: the two of the paper's data set, then common others."""
MADE = frozenset("ceramic corn gummy hot lego plastic plush rubber stuffed teddy toy wooden".split())
"""Words that turn an animal's noun into a thing's: a hot dog, a teddy bear, a rubber duck."""
Sections = dict[str, dict[str, tuple[str, ...]]]
"""A prompt set: `paper` or `more`, then `all`, `live` or `object`, then the prompts."""


def set_names() -> list[str]:
    """Names of the shipped prompt sets, sorted."""
    return sorted(path.stem for path in (configs_dir() / "prompts").glob("*.yaml"))


@cache
def read_set(name: str) -> Sections:
    """The prompts of a shipped set, or of a file where `name` has an extension. Raises ConfigError if it is none."""
    shipped = not Path(name).suffix
    if shipped and name not in set_names():
        raise ConfigError(f"prompt set {name!r}: is not there; sets are {', '.join(set_names())}, or give a .yaml file")
    path = configs_dir() / "prompts" / f"{name}.yaml" if shipped else Path(name)
    try:
        tree = yaml12.read(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        line, problem = yaml12.explain_error(error)
        raise ConfigError(f"{path}:{line}: cannot be read as a prompt set: {problem}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a prompt set: {first_line(error)}") from error
    return _checked(tree, path)


def _checked(tree: object, path: Path) -> Sections:
    wrong = ConfigError(
        f"{path}: is no prompt set; want `paper:` or `more:` with `all:`, `live:` or `object:` under "
        "it, each a list of prompts with {subject}"
    )
    if not isinstance(tree, dict) or not tree or not tree.keys() <= {"paper", "more"}:
        raise wrong
    for section in tree.values():
        if not isinstance(section, dict) or not section.keys() <= {"all", "live", "object"}:
            raise wrong
        for prompts in section.values():
            if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) for one in prompts):
                raise wrong
            for one in prompts:
                fill(one, identifier="x", class_noun="y")
    return {name: {kind: tuple(prompts) for kind, prompts in section.items()} for name, section in tree.items()}


def is_live(class_noun: str, live: Collection[str] = LIVE_CLASSES) -> bool:
    """Whether a class is one of live subjects: the noun is in `live`, or its last word is and no word is in `MADE`.
    "corgi dog" is live, "dog toy" and "hot dog" are not."""
    words = class_noun.casefold().split()
    return " ".join(words) in live or (not MADE.intersection(words) and "".join(words[-1:]) in live)


def application(
    name: str, class_noun: str, live: Collection[str] = LIVE_CLASSES, paper_only: bool = False
) -> tuple[str, ...]:
    """The templates of a prompt set for a class: the paper's, then the others unless `paper_only`."""
    kinds = ("all", "live" if is_live(class_noun, live) else "object")
    sections = [read_set(name).get(section, {}) for section in (("paper",) if paper_only else ("paper", "more"))]
    return tuple(prompt for section in sections for kind in kinds for prompt in section.get(kind, ()))


def prompt_set(class_noun: str, live: Collection[str] = LIVE_CLASSES) -> tuple[str, ...]:
    """The paper's 25 evaluation prompts for a class, as templates with `{subject}`.

    Objects: 20 recontextualizations and 5 property changes; live subjects: 10, 10 accessories and 5.
    """
    names = ("recontext", "accessories", "properties")
    return tuple(prompt for name in names for prompt in application(name, class_noun, live, paper_only=True))


def subject_phrase(identifier: str | None, class_noun: str) -> str:
    """The value of `{subject}`: identifier and class noun, or the class noun alone where identifier is None."""
    return f"{identifier} {class_noun}" if identifier else class_noun


def fill(template: str, *, identifier: str | None = None, class_noun: str) -> str:
    """The template with its placeholders filled in. identifier: None is for the class as such.

    Raises ConfigError for an unknown placeholder, and for `{identifier}` or `[trigger]` where identifier is None.
    """
    values = {"identifier": identifier, "class": class_noun, "subject": subject_phrase(identifier, class_noun)}
    if odd := unknown_place(template):
        raise ConfigError(
            f"caption or prompt {template!r}: unknown placeholder {odd}, want {{identifier}}, {{class}}, {{subject}} "
            "or [trigger]; of other braces only JSON's are text, which a quote follows"
        )

    def value(place: re.Match[str]) -> str:
        filled = values["identifier" if place[1] is None else place[1]]
        if filled is None:
            raise ConfigError(
                f"caption or prompt {template!r}: {place[0]} has no value, because the class as such "
                "has no identifier; use {class} or {subject}"
            )
        return filled

    return PLACES.sub(value, template)


def unknown_place(template: str) -> str | None:
    """The first brace of a template, with what is in it, that begins neither a placeholder nor an object of JSON."""
    found = _ODD.search(template)
    return found and found[0]


def names_subject(template: str, identifier: str | None = None) -> bool:
    """Whether a template names the subject: by a placeholder, or by the identifier itself, in any case of letters."""
    written = identifier is not None and identifier.casefold() in template.casefold()
    return written or any(place in template for place in NAMING)


def without_identifier(template: str, class_noun: str) -> str:
    """The template with an empty identifier: the prompt for the base model, and the second text of CLIP-T."""
    return " ".join(fill(template, identifier="", class_noun=class_noun).split())


def slug(text: str) -> str:
    """A text as a short file name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "class"
