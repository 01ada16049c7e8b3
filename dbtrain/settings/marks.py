"""What the annotations of settings say: which decide no result, which name a place, which name a row of a table."""

from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import CoreSchema, core_schema

from dbtrain.tiny import NAMED

Tree = TypeVar("Tree", bound=BaseModel)


class Mark(Enum):
    """A property of a setting, written into its annotation. A mark on a group holds for all of the group."""

    LATER = "came after trainings were recorded: at its default it stands in none of their digests"
    NO_RESULT = "does not decide what is learnt, or a digest of its content stands for it"
    PATH = "names a place: a path, or an address with ://"
    PATH_OR_NAME = "names a place where a file or folder of this name exists; else it is a hub id or `embedded`"


class OneOf:
    """The annotation of a text that is one of these names: what `Literal` says of names known beforehand."""

    def __init__(self, names: Iterable[str]):
        self.names = list(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(self.names)


def deciding(config: BaseModel) -> dict[str, Any]:
    """The settings that decide what is learnt, as plain data: all but those marked `NO_RESULT`, and those marked
    `LATER` that have their default."""
    decisive = config.model_dump(mode="json", exclude=without_result(config))
    parts = ((name, getattr(config, name)) for name in decisive)
    return decisive | {name: [deciding(one) for one in value] for name, value in parts if _sections(value)}


def _sections(value: Any) -> bool:
    """Whether a setting is a list of groups of settings."""
    return isinstance(value, tuple) and any(isinstance(one, BaseModel) for one in value)


def without_result(section: BaseModel) -> dict[str, Any]:
    """Names of the fields that `deciding` leaves out: True for a whole field, a mapping like this one for parts of a
    group."""
    names: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if Mark.NO_RESULT in field.metadata or (Mark.LATER in field.metadata and value == field.default):
            names[name] = True
        elif isinstance(value, BaseModel):
            names[name] = without_result(value)
    return {name: parts for name, parts in names.items() if parts}


def anchored(config: Tree) -> Tree:
    """The same settings with relative paths made absolute, for a process that runs in another folder."""
    changed: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            changed[name] = anchored(value)
        if _sections(value):
            changed[name] = tuple(anchored(one) for one in value)
        for mark in ANCHORS.keys() & set(field.metadata):
            changed[name] = ANCHORS[mark](value)
    return config.model_copy(update=changed)


def absolute(path: str | None) -> str | None:
    """A path, absolute, with `~` replaced; an address or None as it is."""
    return path if path is None or "://" in path else str(Path(path).expanduser().absolute())


def absolute_name(name: str | None) -> str | None:
    """A name as `absolute` if a file or folder of this name exists; what ships and a hub id as they are."""
    return name if name is None or name in NAMED or not Path(name).expanduser().exists() else absolute(name)


ANCHORS: dict[Mark, Callable[[str | None], str | None]] = {Mark.PATH: absolute, Mark.PATH_OR_NAME: absolute_name}
"""The function that makes a value absolute, by the mark of its setting."""
