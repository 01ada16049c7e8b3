"""All that a driver, a worker and a trainer send each other. Nothing here imports torch, so a worker stays light."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dbtrain.fleet.causes import End
from dbtrain.fleet.schedule import WorkUnit
from dbtrain.values import Subject

if TYPE_CHECKING:
    from dbtrain.data.index import Entry


@dataclass(frozen=True)
class Measure:
    """Measure how many subjects a pack holds: subjects of this LoRA rank (None: the recipe's), at most so many."""

    rank: int | None
    most: int


@dataclass(frozen=True)
class Task:
    """What a trainer is started with. evaluation: fields of `evaluate.protocol.Protocol`. environment: the trainer's
    place in a gang, for torch.distributed. token: proof that a folder is the run's (`run_folder.mark`)."""

    config: Mapping[str, Any]
    out: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    token: str = ""
    measure: Measure | None = None


@dataclass(frozen=True)
class Order:
    """A unit with all that its work needs. after: for each subject the names of what is to be done with it once it is
    finished (`work.AFTER`)."""

    number: int
    unit: WorkUnit
    subjects: tuple[Subject, ...] = ()
    rows: tuple[Entry, ...] = ()
    after: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Beat:
    """A trainer is alive, and at this stage. Ends at the worker."""

    stage: str


@dataclass(frozen=True)
class Published:
    """A trainer has written a subject's folder; the worker verifies it and says `Finished` or `Failed` instead."""

    number: int
    position: int
    subject: str
    seconds: float


@dataclass(frozen=True)
class Leaving:
    """A trainer ends itself. Ends at the worker, which says `Died` once the process is gone."""

    end: End


@dataclass(frozen=True)
class Ready:
    """A trainer has loaded the base of this digest. pack: how many subjects a pack holds, where it was to measure."""

    base: str
    pack: int | None = None


@dataclass(frozen=True)
class Finished:
    """A subject's files are published and verified. result: `worker.read_result`, and gpu_seconds."""

    number: int
    position: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """A subject's attempt has ended without a result, and its trainer goes on."""

    number: int
    position: int
    end: End
    seconds: float


@dataclass(frozen=True)
class FollowedUp:
    """A finished subject was drawn or scored (outcome `done`), or could not be (the reason)."""

    number: int
    position: int
    name: str
    outcome: str


@dataclass(frozen=True)
class UnitDone:
    """A unit is over, after so many seconds."""

    number: int
    seconds: float


@dataclass(frozen=True)
class Died:
    """A trainer is dead: the last message of its generation."""

    end: End


Message = Ready | Finished | Failed | FollowedUp | UnitDone | Died
"""What reaches the driver. `number` is the order's, `position` the subject's in the ledger."""
