"""Identifier and class noun of a training prompt, and templates of prompts."""

import re

_KINDS = "photo|photograph|picture|image|drawing|painting"
_PICTURE = re.compile(rf"(?:(?:an?|the)\s+)?(?:\w+\s+)?(?:{_KINDS})s?\s+of\s+", re.I)
_TAIL = re.compile(r"\s+(?:in|on|at|with|wearing|from|near|under|by|and|sitting|standing)\b.*|\s*[,.;].*", re.I)
_ARTICLE = re.compile(r"(?:an?|the)\s+", re.I)


def split_prompt(instance: str, prior: str) -> tuple[str | None, str | None]:
    """(identifier, class noun) of `a photo of sks dog` and, where given, `a photo of dog`; None where not found."""
    subject = _core(instance)
    noun = _core(prior) or None
    if noun and (found := re.match(rf"(.+?)\s+{re.escape(noun)}$", subject, re.I)):
        return found[1], noun
    words = subject.split()
    known = next((word for word in re.findall(r"\w+", instance) if word.lower() in IDENTIFIERS), None)
    if known and known not in words and noun is None and words:
        return known, subject  # "3d icon in the style of TOK"
    if noun is None and len(words) > 1:
        place = _rare_word(words)
        return words[place], " ".join(words[place + 1 :] or words[:place])
    # "a photo of sks" beside "a photo of a dog": the noun stands in the class prompt only.
    return (words[0] if len(words) == 1 and subject != noun else None), noun


def _rare_word(words: list[str]) -> int:
    """Place of the identifier among a prompt's words: of the first that is no word, or else of the first."""
    return next((place for place, word in enumerate(words) if not _is_word(word)), 0)


def _is_word(text: str) -> bool:
    """Whether letters can be spoken as a word: at least a vowel, and no long run of consonants or digit."""
    plain = text.lower().strip(".,;:!?")
    if not plain.isalpha():
        return False
    vowels = len(re.findall("[aeiouy]", plain))
    return bool(vowels) and not re.search(r"[bcdfghjklmnpqrstvwxz]{4}", plain) and plain not in IDENTIFIERS


IDENTIFIERS = frozenset("sks ohwx zwx olis gabi tok hta ktn shs srx bnha".split())
"""Identifiers that tutorials give, some of which can be spoken."""


def _core(prompt: str) -> str:
    """What a prompt shows: without `a photo of a` before it and the scene behind it."""
    return _TAIL.sub("", _ARTICLE.sub("", _PICTURE.sub("", prompt.strip(), count=1), count=1)).strip()


def template(prompt: str, identifier: str | None, noun: str, subject: bool = False) -> str:
    """The prompt with identifier and class noun replaced by placeholders."""
    text = prompt.replace("{", "(").replace("}", ")")
    if identifier and subject:
        text = re.sub(rf"\b{re.escape(identifier)}\s+{re.escape(noun)}\b", "{subject}", text, flags=re.I)
    if identifier:
        text = re.sub(rf"(?<!\w){re.escape(identifier)}(?!\w)", "{identifier}", text)
    return re.sub(rf"(?<![\w{{]){re.escape(noun)}(?![\w}}])", "{class}", text, flags=re.I)
