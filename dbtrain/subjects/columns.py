"""The columns of a manifest, a row each: how a cell is checked, and which setting of the run its value replaces.

A new column is a row of `COLUMNS` and a field of `values.Subject`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from dbtrain.errors import shown
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.captions import CONTROL, LONE, check_caption, check_captions
from dbtrain.subjects.finding import CellError
from dbtrain.subjects.masks import masks_of
from dbtrain.subjects.photos import IMAGES, photos_of
from dbtrain.values import SUBJECT_ID

MAX_NAME = 100
"""Longest class noun or identifier, in characters."""
ID = ("letters, digits, _ and -, at most 64, the first a letter or digit", "correct the id")
CLASS = (f"a class noun of at most {MAX_NAME} characters, such as dog", "name the kind of thing the subject is")

Check = Callable[[Any, Path], Any]
"""The value of (cell, folder of the manifest). Raises CellError."""


@dataclass(frozen=True)
class Column:
    """One column of a manifest."""

    name: str
    check: Check
    field: str
    """Field of `Subject` that holds the value."""
    setting: str | None = None
    """Dotted name of the setting that the value replaces; None where it replaces none."""
    required: tuple[str, str] | None = None
    """What the cell must hold, and what to do about an empty one; None where a cell may be empty."""
    conflicts: Callable[[Any, RunConfig], Iterator[tuple[str, str]]] = lambda value, config: iter(())
    """(what, remedy) of each reason why a run's settings cannot give the subject this value."""


def check_class(cell: Any, _: Path) -> str:
    """A class noun, without spaces around it."""
    text = _string(cell)
    if not text.strip() or len(text) > MAX_NAME or CONTROL.search(text) or set("{}") & set(text):
        raise CellError(f"got {shown(text)}", *CLASS)
    return text.strip()


def _id(cell: Any, _: Path) -> str:
    text = _string(cell)
    if not SUBJECT_ID.fullmatch(text):
        raise CellError(f"got {shown(text)}", *ID)
    return text


def _identifier(cell: Any, _: Path) -> str:
    text = _string(cell)
    if len(text) > MAX_NAME or CONTROL.search(text) or set("{} ") & set(text):
        want = "one rare word without spaces or braces"
        raise CellError(f"got {shown(text)}", want, "see `dbtrain identifiers`, or leave it empty")
    return text


def _caption(cell: Any, _: Path) -> str:
    return check_caption(_string(cell))


def _string(cell: Any) -> str:
    if isinstance(cell, bool) or not isinstance(cell, (str, int)):
        raise CellError(f"got {shown(cell)}", "text", "put quotes around it, or leave it empty")
    text = str(cell)
    if LONE.search(text):
        raise CellError(f"got {shown(text)}, with half a character", "Unicode text", "write that character again")
    return text


def _number(kind: type, low: float, high: float, want: str) -> Check:
    """The check of a number of a kind, int or float, above `low` and below `high`."""

    def check(cell: Any, _: Path) -> Any:
        try:
            # As Decimal, 42.0 and 1e3 are whole, and a number is compared with the bounds before its digits are made.
            value = Decimal(cell) if kind is int and isinstance(cell, str) else cell if kind is int else kind(cell)
            if isinstance(cell, bool) or not low < value < high or kind(value) != value:
                raise ValueError
        except (TypeError, ValueError, OverflowError, InvalidOperation):
            comma = isinstance(cell, str) and "," in cell
            remedy = "write a point for the comma" if comma else "correct it, or leave it empty"
            raise CellError(f"got {shown(cell)}", want, remedy) from None
        return kind(value)

    return check


def _whole(low: int, high: int) -> Check:
    """The check of a whole number from `low` to `high`."""
    bound = f"to {high}" if high < 2**62 else "up"
    return _number(int, low - 1, high + 1, f"a whole number from {low} {bound}")


def _steps_conflicts(steps: int, config: RunConfig) -> Iterator[tuple[str, str]]:
    warmup = config.train.warmup_steps
    if steps <= warmup:
        yield f"is {steps}, but train.warmup_steps is {warmup}", "raise it, or shorten the warm-up"


def _rank_conflicts(rank: int, config: RunConfig) -> Iterator[tuple[str, str]]:
    method = config.train.method
    if method != "lora":
        what = f"is {rank}, but train.method is {method}, so it would have no effect"
        yield what, "leave it empty, or set train.method=lora"


def _prior_conflicts(weight: float, config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.prior.weight == 0 and config.engine.kind == "packed":
        what = f"is {weight} while prior.weight is 0, and the subjects of a pack have priors all or none"
        yield what, "set prior.weight, or leave it empty"
    if config.prior.images == 0:
        yield f"is {weight}, but prior.images is 0", "raise prior.images, or leave it empty"


_RATE = _number(float, 0, 1, "a number between 0 and 1, such as 1e-4")
_WEIGHT = _number(float, 0, math.inf, "a number above 0")
COLUMNS = {
    column.name: column
    for column in (
        Column("subject", _id, "id", required=ID),
        Column("class", check_class, "class_noun", required=CLASS),
        Column("images", photos_of, "images", required=IMAGES),
        Column("mask", masks_of, "masks"),
        Column("caption", _caption, "caption"),
        Column("captions", lambda cell, _: check_captions(cell), "captions"),
        Column("identifier", _identifier, "identifier"),
        Column("seed", _whole(0, 2**63 - 1), "seed", "seed"),
        Column("steps", _whole(1, 10**9 - 1), "steps", "train.steps", conflicts=_steps_conflicts),
        Column("lr", _RATE, "lr", "train.lr"),
        Column("rank", _whole(1, 1024), "rank", "lora.rank", conflicts=_rank_conflicts),
        Column("prior_weight", _WEIGHT, "prior_weight", "prior.weight", conflicts=_prior_conflicts),
    )
}
"""Every column by its name, in the order of defects."""
