"""What the folder of a subject says before training: whether another process trains the subject, whether it is
finished, and which checkpoint to go on from."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.engines.world import World, from_first, together
from dbtrain.errors import DataError, StopRequested, SubjectTaken
from dbtrain.results.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    named_checkpoint,
    read_checkpoint,
    tidy_checkpoints,
    verify_checkpoint,
)
from dbtrain.results.record import QUICK_BYTES, drop_record, file_problem, read_record
from dbtrain.settings.config import CheckpointConfig
from dbtrain.storage.atomic import LOCK, held, sweep
from dbtrain.training.session import Watch

WAIT_S = 30.0
"""How long to wait for a subject that another process trains. The lock of a killed process may stay for a while."""


@dataclass(frozen=True)
class Claim:
    """What there is to do for a subject. record: its record, if it is finished. checkpoint: the one to go on from; None
    is a fresh start."""

    record: dict[str, Any] | None = None
    checkpoint: Path | None = None


def claim_subject(
    world: World, watch: Watch, folder: Path, settings: CheckpointConfig, run: str, fence: ExitStack
) -> Claim:
    """What all ranks are to do for the subject of a folder. The first rank looks, and one message brings the others its
    answer or its error.

    While `fence` is open no other process trains the subject. Raises SubjectTaken if another one goes on training it,
    StopRequested while waiting for that, DataError if the folder holds another run's result.
    """

    def claim() -> Claim:
        take_subject(watch, folder, fence)
        record = read_finished(watch, folder, run)
        if record is not None:
            return Claim(record)
        checkpoint = choose_checkpoint(watch, folder, settings, run)
        watch.opened()
        return Claim(None, checkpoint)

    return from_first(world, claim)


def take_subject(watch: Watch, folder: Path, fence: ExitStack) -> None:
    """Lock the subject of a folder until `fence` closes, and remove what a broken write left there.

    On storage that nodes share, a trainer that a fleet gave up as lost may still be at work; wait for it for a while.
    """
    begun = time.monotonic()
    while not fence.enter_context(held(folder / LOCK)):
        fence.close()
        if watch.stop.asked:
            raise StopRequested(f"{folder.name}: stopped on request before training; run the same command to go on")
        if time.monotonic() - begun > WAIT_S:
            raise SubjectTaken(f"{folder}: another process trains this subject; wait for it or stop it, then run again")
        watch.beat("wait")
        time.sleep(min(0.2, WAIT_S))
    for place in (folder, *folder.glob("samples/*")):
        sweep(place)


def read_finished(watch: Watch, folder: Path, run: str) -> dict[str, Any] | None:
    """The record of a finished subject; None where there is no record, or where its files are not what it says.

    Such a record is removed, with a line for the person who watches, so that the subject is trained on. Raises
    DataError for another run's.
    """
    record = read_record(folder)
    if record is None:
        return None
    if record["run"] != run:
        raise DataError(f"{folder}: holds a finished subject trained with other settings or data; use another --out")
    problem = file_problem(folder, record, QUICK_BYTES)
    if problem is None:
        return record
    watch.say(f"{folder.name}: is not finished after all, and trained on: {problem}")
    drop_record(folder)
    return None


def choose_checkpoint(watch: Watch, folder: Path, settings: CheckpointConfig, run: str) -> Path | None:
    """What to go on from: the newest good checkpoint of this run, or the named one; None is a fresh start."""
    root = folder / "checkpoints"
    tidy_checkpoints(root, settings.keep)
    if settings.resume != "latest":
        return named_checkpoint(root, settings.resume, run)
    newest, notes = latest_checkpoint(root, run)
    for note in notes:
        watch.say(note)
    return newest


def read_chosen(world: World, watch: Watch, folder: Path) -> Checkpoint:
    """The contents of the checkpoint that the first rank chose; every other rank proves that it sees the same."""

    def read() -> Checkpoint:
        defect = None if world.first else verify_checkpoint(folder)
        if defect:
            what = f"{folder}: is damaged or missing to rank {world.rank}: {defect}"
            raise DataError(f"{what}; check that all nodes see the same storage")
        return read_checkpoint(folder)

    checkpoint = together(world, read)
    watch.say(f"{folder.parents[1].name}: resuming after step {checkpoint.step}")
    return checkpoint
