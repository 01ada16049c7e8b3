"""What a result was made from, and how that differs from what is wanted now.

A record and a checkpoint hold `about`: the settings that decide a result, and the digests of base and photos. Those of
an earlier dbtrain hold only its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dbtrain.errors import shown

About = Mapping[str, Any]
PHOTOS = "photos"
"""Digests of a subject's stored photos, in order. The run's digest has one digest of them all, under `data`."""
STEPS = "train.steps"
MEANINGS = {
    "base": "the base model differs",
    "data": "the photos differ",
    "init": "the adapter in lora.init differs",
    "upscalers": "the base model of a stage that enlarges differs",
    "priors": "the imported class images differ",
}
"""What is said of parts that are digests."""


class Relation(Enum):
    """How a training that is wanted relates to one that was made."""

    SAME = "made from the same"
    LONGER = "the same, for more steps"
    JOINED = "the same, but photos have joined; perhaps for more steps"
    OTHER = "anything else"


@dataclass(frozen=True)
class Identity:
    """What names a training. run: one sha256 of all that decides its result. about: the same in a readable form."""

    run: str
    about: About = field(default_factory=dict)

    @classmethod
    def read(cls, run: str, about: object) -> Identity:
        """The identity that a file holds. `about` counts only where `run` is its digest."""
        return cls(run, about if isinstance(about, dict) and digest_of(about) == run else {})


def digest_of(about: About) -> str:
    """The run's digest of what decides its result."""
    decisive = {name: value for name, value in about.items() if name != PHOTOS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def changes(old: About, new: About) -> dict[str, tuple[Any, Any]]:
    """(old value, new value) by name, for all that differs; a setting has its dotted key as its name."""
    before, after = _flat(old), _flat(new)
    return {
        name: (before.get(name), after.get(name))
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    }


def _flat(about: About) -> dict[str, Any]:
    """Settings by their dotted keys, and everything else by its name; photos, whose digest is `data`, are left out."""
    flat = {name: value for name, value in about.items() if name not in (PHOTOS, "settings")}
    left = [("", about.get("settings", {}))]
    for prefix, section in left:
        for name, value in section.items():
            if isinstance(value, Mapping):
                left.append((f"{prefix}{name}.", value))
            else:
                flat[f"{prefix}{name}"] = value
    return flat


def relation(made: Identity, wanted: Identity) -> Relation:
    """How a training that is wanted relates to one that was made."""
    if made.run == wanted.run:
        return Relation.SAME
    if not made.about or not wanted.about:
        return Relation.OTHER
    changed = changes(made.about, wanted.about)
    steps = changed.pop(STEPS, (0, 0))
    if steps[0] > steps[1]:
        return Relation.OTHER
    if not changed:
        return Relation.LONGER
    missing = Counter(map(str, made.about.get(PHOTOS, ()))) - Counter(map(str, wanted.about.get(PHOTOS, ())))
    return Relation.JOINED if set(changed) == {"data"} and PHOTOS in made.about and not missing else Relation.OTHER


def difference(made: Identity, wanted: Identity) -> str:
    """What differs, as `train.lr was 0.001, is 0.002; ...`; the two digests where a record does not say more."""
    if not made.about or not wanted.about:
        return f"run {made.run[:12]}, this one is {wanted.run[:12]}"
    told = []
    for name, (old, new) in changes(made.about, wanted.about).items():
        told.append(MEANINGS.get(name, f"{name} was {_value(old)}, is {_value(new)}"))
    return "; ".join(told)


def _value(value: Any) -> str:
    return "not set" if value is None else shown(value)
