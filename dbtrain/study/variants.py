"""The variants of a recipe that a study compares, and which of them can share a pack."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from dbtrain.errors import ConfigError
from dbtrain.models.recognition import settled
from dbtrain.settings.config import RunConfig
from dbtrain.settings.recipes import load
from dbtrain.subjects.columns import COLUMNS

RECIPE = "recipe"
"""Name of the variant that is the recipe as it is."""
LONGEST = 60
"""Longest name of a variant; it becomes that of a folder."""
OWN = {column.setting: column.field for column in COLUMNS.values() if column.setting}
"""Settings that a row of a pack has of its own, and the field of a `Subject` that gives each to it."""

Change = tuple[str, str]
"""A dotted key, and its value as the command line writes it."""


@dataclass(frozen=True)
class Variant:
    """One recipe of a study. changes: what it changes of the study's recipe, in the order of --vary."""

    name: str
    changes: tuple[Change, ...]
    config: RunConfig

    @property
    def words(self) -> list[str]:
        """Its changes as overrides of the command line."""
        return [f"{key}={word}" for key, word in self.changes]

    @property
    def title(self) -> str:
        """Its changes in one line."""
        return " ".join(self.words) or "the recipe as it is"


@dataclass(frozen=True)
class Group:
    """Variants that train as rows of common packs. config: their settings but for what each row has of its own."""

    config: RunConfig
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Design:
    """What a study varies. recipe: a name or a file. overrides: of the recipe, for all variants. vary: each key with
    its values. random: number of variants drawn from the grid; None takes the whole of it, or one key at a time."""

    recipe: str
    overrides: tuple[str, ...]
    vary: tuple[tuple[str, tuple[str, ...]], ...]
    grid: bool = False
    random: int | None = None

    def variants(self) -> list[Variant]:
        """Every variant, the recipe itself first where it is one of them; equal settings count once."""
        found: dict[str, Variant] = {}
        for changes in self._combinations():
            config = settled(load(self.recipe, [*self.overrides, *(f"{key}={word}" for key, word in changes)]))
            found.setdefault(config.model_dump_json(), Variant(name_of(changes), changes, config))
        return list(found.values())

    def _combinations(self) -> Iterator[tuple[Change, ...]]:
        choices = [[(key, word) for word in words] for key, words in self.vary]
        if self.random is not None:
            every = list(product(*choices))
            yield from islice(random.Random(0).sample(every, len(every)), self.random)
        elif self.grid:
            yield from product(*choices)
        else:
            yield ()
            yield from ((change,) for values in choices for change in values)

    def groups(self, variants: Sequence[Variant]) -> list[Group]:
        """The variants by the packs that they can share, in the order in which they are first met."""
        shared: dict[str, tuple[RunConfig, list[Variant]]] = {}
        for variant in variants:
            words = [f"{key}={word}" for key, word in variant.changes if not self._is_own(key, variant)]
            config = settled(load(self.recipe, [*self.overrides, *words]))
            shared.setdefault(config.model_dump_json(), (config, []))[1].append(variant)
        return [Group(packed(config), tuple(own)) for config, own in shared.values()]

    def _is_own(self, key: str, variant: Variant) -> bool:
        """Whether rows of one pack may differ in this. The subjects of a pack have priors all or none."""
        if key == "prior.weight":
            return variant.config.prior.weight > 0 and load(self.recipe, self.overrides).prior.weight > 0
        return key in OWN


def shorter(variant: Variant, variants: Sequence[Variant]) -> Variant | None:
    """The variant whose training this one goes on from: of those that differ in fewer steps alone, the one of the most.
    None where there is none, or where a step depends on how many follow it, or is followed by none."""
    train = variant.config.train
    if train.schedule != "constant" or train.stop_loss is not None or train.stop.metric != "none":
        return None
    alike = [one for one in variants if one.config.replaced("train.steps", train.steps) == variant.config]
    before = [one for one in alike if one.config.train.steps < train.steps]
    return max(before, key=lambda one: one.config.train.steps, default=None)


def waves(variants: Sequence[Variant]) -> list[list[Variant]]:
    """The variants in the order of their training: what a variant goes on from is in an earlier wave."""

    def depth(variant: Variant) -> int:
        before = shorter(variant, variants)
        return 0 if before is None else 1 + depth(before)

    depths = [depth(variant) for variant in variants]
    return [[one for one, at in zip(variants, depths) if at == number] for number in range(max(depths) + 1)]


def own_values(variant: Variant) -> dict[str, Any]:
    """The fields of a `Subject` by which a row trains as the variant says."""
    keys = [key for key, _ in variant.changes if key in OWN and _given(variant, key)]
    return {OWN[key]: value_of(variant.config, key) for key in keys}


def _given(variant: Variant, key: str) -> bool:
    return key != "prior.weight" or variant.config.prior.weight > 0


def value_of(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def packed(config: RunConfig) -> RunConfig:
    """The settings with the packed engine where adapters train, else DeepSpeed's: the engine decides no result."""
    return config.replaced("engine.kind", "packed" if config.train.method == "lora" else "zero")


def read_vary(text: str) -> tuple[str, tuple[str, ...]]:
    """The key and the values of `KEY=V1,V2`; commas inside brackets are part of a value. Raises ConfigError."""
    key, equals, rest = text.partition("=")
    words = tuple(word.strip() for word in re.split(r",(?![^\[]*\])", rest)) if equals else ()
    if not key or not all(words) or not words:
        raise ConfigError(f"--vary: got {text!r}, want KEY=V1,V2 such as train.lr=1e-4,2e-4")
    return key.strip(), words


def name_of(changes: Sequence[Change]) -> str:
    """A name that says the changes and fits a folder: it stays the same when the study grows."""
    parts = [f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.]+', '-', word).strip('-')}" for key, word in changes]
    name = re.sub(r"[^A-Za-z0-9-]", "_", "-".join(parts).replace("_", "-")) or RECIPE
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(repr(changes).encode()).hexdigest()[:8]}"
