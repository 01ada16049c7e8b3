"""The values that cross module borders.

Legend of shape letters, used as name suffixes: B samples, C channels, H height, W width, T tokens, D features,
N stacked subjects, R rank, S schedule steps. Pixels are RGB in [-1, 1]; latents are in the model's own scale.
"""

import re
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

SUBJECT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What a subject id may look like: it becomes a folder name and part of shard keys."""


class Role(IntEnum):
    """What a sample is for: the subject itself, or its class (prior preservation)."""

    INSTANCE = 0
    PRIOR = 1


@dataclass(frozen=True)
class Subject:
    """One row of a manifest: a thing to learn. `images` are resolved photo paths in a fixed order.

    Overrides are None where the run's configuration holds.
    """

    id: str
    class_noun: str
    images: tuple[Path, ...]
    caption: str | None = None
    identifier: str | None = None
    seed: int | None = None
    steps: int | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Sample:
    """One stored image with its provenance, as it comes out of a shard. `image` is the encoded file's bytes."""

    key: str
    subject: str
    role: Role
    caption: str
    image: bytes
    extension: str
    meta: dict = field(default_factory=dict)
