"""What the folder of a subject says before training: whether another process trains the subject, whether it is
finished, and which checkpoint to go on from."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.engines.world import World, from_first, together
from dbtrain.errors import DataError, StopRequested, SubjectTaken
from dbtrain.results.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    checkpoint_identity,
    latest_checkpoint,
    named_checkpoint,
    read_checkpoint,
    tidy_checkpoints,
    verify_checkpoint,
)
from dbtrain.results.identity import Identity, Relation, difference, relation
from dbtrain.results.record import QUICK_BYTES, drop_record, file_problem, read_record, record_identity
from dbtrain.results.replacing import take_place
from dbtrain.settings.config import CheckpointConfig
from dbtrain.storage.atomic import LOCK, held, hidden, sweep
from dbtrain.training.session import Watch
from dbtrain.training.telemetry import LOG

WAIT_S = 30.0
"""How long to wait for a subject that another process trains. The lock of a killed process may stay for a while."""


@dataclass(frozen=True)
class Claim:
    """What there is to do for a subject. record: its record, if it is finished. checkpoint: the one to go on from; None
    is a fresh start. replaces: whether a result is there that stays until the new one is whole."""

    record: dict[str, Any] | None = None
    checkpoint: Path | None = None
    replaces: bool = False


def claim_subject(
    world: World, watch: Watch, folder: Path, settings: CheckpointConfig, wanted: Identity, fence: ExitStack
) -> Claim:
    """What all ranks are to do for the subject of a folder. The first rank looks, and one message brings the others its
    answer or its error.

    While `fence` is open no other process trains the subject. Raises SubjectTaken if another one goes on training it,
    StopRequested while waiting for that, DataError if the folder holds another run's result.
    """

    def claim() -> Claim:
        take_subject(watch, folder, fence)
        record = read_finished(watch, folder, wanted)
        if record is not None and record["run"] == wanted.run:
            return Claim(record)
        checkpoint = choose_checkpoint(watch, folder, settings, wanted)
        watch.opened()
        return Claim(None, checkpoint, record is not None)

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
    take_place(folder)


def read_finished(watch: Watch, folder: Path, wanted: Identity) -> dict[str, Any] | None:
    """The record of a finished subject; None where there is no record, or where its files are not what it says. The
    record may be of fewer steps, or of some of the photos, and then it is to be replaced.

    A record of damaged files is removed, with a line for the person who watches, so that the subject is trained on.
    Raises DataError for another run's.
    """
    record = read_record(folder)
    if record is None:
        return None
    made = record_identity(record)
    if (how := relation(made, wanted)) is Relation.OTHER:
        raise DataError(
            f"{folder}: holds a finished subject trained with other settings or data ({difference(made, wanted)}); "
            "use another --out"
        )
    problem = file_problem(folder, record, QUICK_BYTES)
    if problem is None:
        if how is not Relation.SAME:
            watch.say(f"{folder.name}: {how.value}; the result that is there stays until the new one is whole")
        return record
    watch.say(f"{folder.name}: is not finished after all, and trained on: {problem}")
    drop_record(folder)
    return None


def choose_checkpoint(watch: Watch, folder: Path, settings: CheckpointConfig, wanted: Identity) -> Path | None:
    """What to go on from: the newest good checkpoint of this run, or the named one; None is a fresh start.

    Where photos have joined since, the start is fresh: checkpoints are removed, and the log is put aside.
    """
    root = folder / "checkpoints"
    tidy_checkpoints(root, settings.keep)
    if settings.resume != "latest":
        return named_checkpoint(root, settings.resume, wanted)
    _start_over_for_photos(watch, folder, wanted)
    newest, notes = latest_checkpoint(root, wanted)
    for note in notes:
        watch.say(note)
    if newest is not None:
        _tell_of_schedule(watch, newest, wanted)
    return newest


def _start_over_for_photos(watch: Watch, folder: Path, wanted: Identity) -> None:
    """Remove the checkpoints of a training on fewer photos."""
    found = [path for path in checkpoint_folders(folder / "checkpoints") if verify_checkpoint(path) is None]
    if not found or relation(checkpoint_identity(found[0]), wanted) is not Relation.JOINED:
        return
    watch.say(f"{folder.name}: photos have joined it; it is trained anew")
    # The newest goes last: should this be killed, what is left still says that the start is to be fresh.
    for path in reversed(found):
        os.rename(path, hidden(path))
    sweep(folder / "checkpoints")
    if (folder / LOG).exists():
        os.replace(folder / LOG, folder / f"{LOG}.before")


def _tell_of_schedule(watch: Watch, checkpoint: Path, wanted: Identity) -> None:
    """Say what it means to go on for more steps than was planned, where the learning rate decays."""
    made = checkpoint_identity(checkpoint)
    if relation(made, wanted) is not Relation.LONGER:
        return
    was, now = (about["settings"]["train"] for about in (made.about, wanted.about))
    name, step = checkpoint.parents[1].name, int(checkpoint.name.removeprefix("step-"))
    if now["schedule"] == "constant":
        watch.say(f"{name}: goes on to step {now['steps']} instead of {was['steps']}; the result is that of a training "
                  "that was planned so")  # fmt: skip
    else:
        watch.say(
            f"{name}: train.schedule is {now['schedule']}: the rate of steps 1 to {step} fell as for {was['steps']} "
            f"steps, and from step {step + 1} on it is that of {now['steps']} steps, which is higher; the result is "
            f"not that of {now['steps']} steps from the start"
        )


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
