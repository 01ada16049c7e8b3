"""What the folder of a subject says before training: whether another process has it, whether it is done, and where to
go on from."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dbtrain.engines.world import together
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
from dbtrain.training.session import Session


def take_subject(session: Session, folder: Path, fence: ExitStack) -> None:
    """Nothing; while `fence` is open nobody else trains the subject of this folder, which holds no remains.

    On storage that nodes share, a trainer that a fleet gave up as lost may still be at work: it is waited for a while.
    """
    begun = time.monotonic()
    while not fence.enter_context(held(folder / LOCK)):
        fence.close()
        if session.stop:
            raise StopRequested(f"{folder.name}: stopped on request before training; run the same command to go on")
        if time.monotonic() - begun > session.taken_wait_s:
            raise SubjectTaken(f"{folder}: another process trains this subject; wait for it or stop it, then run again")
        session.beat("wait")
        time.sleep(min(0.2, session.taken_wait_s))
    for place in (folder, *folder.glob("samples/*")):
        sweep(place)


def read_finished(session: Session, folder: Path, run: str) -> dict[str, Any] | None:
    """The record of a subject that is done; None where there is none, or where its files are not what it says.

    Such a record is removed with a word, so that the subject is trained on. Raises DataError for another run's.
    """
    record = read_record(folder)
    if record is None:
        return None
    if record["run"] != run:
        raise DataError(f"{folder}: holds a finished subject trained with other settings or data; use another --out")
    problem = file_problem(folder, record, QUICK_BYTES)
    if problem is None:
        return record
    session.say(f"{folder.name}: is not finished after all, and trained on: {problem}")
    drop_record(folder)
    return None


def choose_checkpoint(session: Session, folder: Path, settings: CheckpointConfig, run: str) -> Path | None:
    """What to go on from: the newest good checkpoint of this run, or the named one; None is a fresh start."""
    root = folder / "checkpoints"
    tidy_checkpoints(root, settings.keep)
    if settings.resume != "latest":
        return named_checkpoint(root, settings.resume, run)
    found, notes = latest_checkpoint(root, run)
    for note in notes:
        session.say(note)
    return found


def read_chosen(session: Session, folder: Path) -> Checkpoint:
    """The contents of the checkpoint that the first rank chose; every other rank proves that it sees the same."""

    def read() -> Checkpoint:
        defect = None if session.world.first else verify_checkpoint(folder)
        if defect:
            what = f"{folder}: is damaged or missing to rank {session.world.rank}: {defect}"
            raise DataError(f"{what}; check that all nodes see the same storage")
        return read_checkpoint(folder)

    checkpoint = together(session.world, read)
    session.say(f"{folder.parents[1].name}: resuming after step {checkpoint.step}")
    return checkpoint
