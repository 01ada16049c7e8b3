"""The main job: build -> resume -> loop -> publish, for one subject after another on a base that stays loaded."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from dbtrain.engines.world import from_first, start_world
from dbtrain.errors import DataError, DbtrainError, EngineError, StopRequested
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import LOCK, held
from dbtrain.storage.trouble import bare
from dbtrain.subjects.manifest import read_manifest, scan_manifest
from dbtrain.training.job import Finished, open_job
from dbtrain.training.session import Session, open_session, restore_base
from dbtrain.training.telemetry import refuse_trackers
from dbtrain.values import Subject


def train_manifest(
    manifest: Path,
    config: RunConfig,
    out: Path,
    chosen: Sequence[str] | None,
    quiet: bool = False,
    skip_bad: bool = False,
    opened: Callable[[], object] = lambda: None,
) -> tuple[list[dict[str, Any]], dict[str, DbtrainError]]:
    """The records of the chosen subjects (None is all), and the error of each that failed; the others are not affected.

    skip_bad: leave subjects with findings out; they are told, and named in `shards/skipped.json`. opened: what
    `Session.opened` is. Raises DataError for
    unknown ids or while another run works on `out`, and StopRequested when the process was asked to stop.
    """
    refuse_trackers(config.track)
    photos = config.data.shards is None
    subjects = scan_manifest(manifest, photos)[0] if skip_bad else read_manifest(manifest, photos)
    known = {subject.id: subject for subject in subjects}
    unknown = [name for name in chosen or () if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise DataError(f"{manifest}: has no subject {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    with ExitStack() as fence:
        if not from_first(start_world(), lambda: fence.enter_context(held(out / LOCK))):
            raise DataError(f"{out}: another run is working there; wait for it or stop it, or use another --out")
        session = open_session(config, subjects, manifest, out, quiet, skip_bad)
        session.opened = opened
        sound = [known[name] for name in chosen or known if name in session.identifiers]
        return _train_all(session, sound)


def _train_all(
    session: Session, subjects: Sequence[Subject]
) -> tuple[list[dict[str, Any]], dict[str, DbtrainError]]:
    records: list[dict[str, Any]] = []
    failed: dict[str, DbtrainError] = {}

    def finished(subject: Subject, outcome: dict[str, Any] | DbtrainError) -> None:
        if isinstance(outcome, DbtrainError):
            failed[subject.id] = outcome
            session.say(f"{subject.id}: failed: {outcome}")
        else:
            records.append(outcome)

    train_subjects(session, subjects, finished)
    return records, failed


def train_subjects(session: Session, subjects: Sequence[Subject], finished: Finished) -> None:
    """Nothing; calls `finished` with every subject's record, or with the error that ended it, as soon as it is known.

    A failed subject does not affect the others; a disk that refuses ends them all. Raises StopRequested when the
    process was asked to stop.
    """
    if session.config.engine.kind == "packed":
        from dbtrain.packing.loop import train_packed

        train_packed(session, subjects, finished)
        return
    for subject in subjects:
        finished(subject, train_subject(session, subject))


def train_subject(session: Session, subject: Subject) -> dict[str, Any] | DbtrainError:
    """The record of a subject, of this training or of an earlier one with the same settings and data; or what keeps it,
    and it alone, from being trained."""
    opened = None
    try:
        opened = open_job(session, subject)
        if isinstance(opened, dict):
            return opened
        with closing(opened):
            return opened.run_to_end()
    except StopRequested:
        raise
    except (EngineError, DataError) as error:
        if opened is not None:
            # Bad data in training may have met one rank alone, and the others would wait for it without end.
            if isinstance(error, DataError) and session.world.size > 1:
                raise
            restore_base(session)
        return bare(error)
