"""The main job: every subject of a manifest, one after another or in packs, on a base that is loaded once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dbtrain.engines.world import from_first, start_world
from dbtrain.errors import DataError, DbtrainError, EngineError, StopRequested
from dbtrain.results.uploading import Uploads, refuse_address
from dbtrain.settings.config import RunConfig
from dbtrain.settings.stages import stage_names
from dbtrain.storage.atomic import LOCK, held
from dbtrain.storage.trouble import bare
from dbtrain.subjects.finding import Finding, refuse
from dbtrain.subjects.forgotten import not_forgotten, read_tombstones, refuse_pending
from dbtrain.subjects.manifest import scan_manifest
from dbtrain.training.bank import texts_of_run
from dbtrain.training.job import Finished, open_job
from dbtrain.training.session import Base, Watch, Work, join_run, open_work
from dbtrain.training.stopping import signals_as_before
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
    watch: Watch | None = None,
) -> tuple[list[dict[str, Any]], dict[str, DbtrainError]]:
    """The records of the chosen subjects (None is all), and the error of each that failed, or was trained and not
    uploaded; the others are not affected.

    skip_bad: leave subjects with findings out, print them, and name them in `shards/skipped.json`. opened: see `Watch`.
    watch: of the caller's own, in place of quiet and opened.
    Raises DataError for unknown ids or while another run works on `out`, and StopRequested when the process was asked
    to stop.
    """
    refuse_trackers(config.track)
    refuse_address(config.publish)
    refuse_pending(out)
    subjects, findings = not_forgotten(*scan_manifest(manifest, config.data.shards is None), out)
    if not skip_bad:
        refuse(findings)
    known = dict.fromkeys(subject.id for subject in subjects)
    unknown = [name for name in chosen or () if name not in known]
    if unknown and unknown[0] in read_tombstones(out):
        raise DataError(f"{out}: {unknown[0]!r} was forgotten here on request; choose another --out to train it again")
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise DataError(f"{manifest}: has no subject {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return train_chosen(subjects, findings, config, out, chosen or [*known], quiet, skip_bad, opened, watch)


def train_chosen(
    subjects: Sequence[Subject],
    findings: Sequence[Finding],
    config: RunConfig,
    out: Path,
    chosen: Sequence[str],
    quiet: bool = False,
    skip_bad: bool = False,
    opened: Callable[[], object] = lambda: None,
    watch: Watch | None = None,
) -> tuple[list[dict[str, Any]], dict[str, DbtrainError]]:
    """What `train_manifest` returns, for a manifest that `scan_manifest` has read. The photos of all subjects are
    sharded, and the subjects with the ids `chosen` are trained."""
    world = start_world()
    with signals_as_before(), ExitStack() as fence:
        if not from_first(world, lambda: fence.enter_context(held(out / LOCK))):
            raise DataError(f"{out}: another run is working there; wait for it or stop it, or use another --out")
        watch = watch or Watch(quiet, opened=opened)
        watch = replace(watch, quiet=watch.quiet or not world.first)
        base = join_run(config, watch, subjects)
        work = open_work(base, watch, subjects, findings, out, chosen, skip_bad)
        return _train_all(base, work, watch)


def _train_all(base: Base, work: Work, watch: Watch) -> tuple[list[dict[str, Any]], dict[str, DbtrainError]]:
    records: list[dict[str, Any]] = []
    failed: dict[str, DbtrainError] = {}
    uploads = Uploads(base.settings.publish.to if base.world.first else None, watch.say)

    def finished(subject: Subject, outcome: dict[str, Any] | DbtrainError) -> None:
        if isinstance(outcome, DbtrainError):
            failed[subject.id] = outcome
            watch.say(f"{subject.id}: failed: {outcome}")
        else:
            records.append(outcome)
            uploads.add([work.folder(subject)])

    try:
        train_subjects(base, work, watch, finished)
    except StopRequested as stop:
        raise StopRequested(f"{stop}{uploads.left}") from None
    return records, {**failed, **uploads.finish(lambda: watch.stop.asked)}


def train_subjects(base: Base, work: Work, watch: Watch, finished: Finished) -> None:
    """Train every subject, and call `finished` with its record, or with the error that ended it, as soon as it ends.

    A failed subject does not affect the others; a disk that refuses ends them all. Raises StopRequested when the
    process was asked to stop.
    """
    left = _train_upscalers(base, work, watch, finished)
    for stage in base.upscalers:  # the first stage's sheets are drawn through all
        stage.ready(texts_of_run(stage, left, base.settings.sample.images))
    _train_stage(base, left, watch, finished)


def _train_upscalers(base: Base, work: Work, watch: Watch, finished: Finished) -> Work:
    """The work on the first stage that is left, after the stages that enlarge were trained; `finished` is told of those
    subjects that failed in one. Why they come first: docs/decisions/upscalers-first.md."""
    for name, stage in zip(stage_names(base.settings), base.upscalers):
        failed: dict[str, DbtrainError] = {}
        # The columns say how the first stage is trained.
        plain = [replace(subject, steps=None, lr=None, rank=None, prior_weight=None) for subject in work.subjects]
        watch.say(f"{name}: {stage.settings.model.family}, for {len(plain)} subjects")
        _train_stage(stage, replace(work, subjects=plain, stage=name), watch, partial(_note_failed, failed))
        for subject in work.subjects:
            if subject.id in failed:
                finished(subject, failed[subject.id])
        work = replace(work, subjects=[subject for subject in work.subjects if subject.id not in failed])
    return work


def _note_failed(
    failed: dict[str, DbtrainError], subject: Subject, outcome: dict[str, Any] | DbtrainError
) -> None:
    if isinstance(outcome, DbtrainError):
        failed[subject.id] = outcome


def _train_stage(base: Base, work: Work, watch: Watch, finished: Finished) -> None:
    with watch.clock.stage("load"):
        base.ready(texts_of_run(base, work))
    if base.settings.engine.kind == "packed":
        from dbtrain.packing.loop import train_packed

        train_packed(base, work, watch, finished)
        return
    for subject in work.subjects:
        finished(subject, train_subject(base, work, watch, subject))


def train_subject(base: Base, work: Work, watch: Watch, subject: Subject) -> dict[str, Any] | DbtrainError:
    """The record of a subject, of this training or of an earlier one with the same settings and data; or what keeps it,
    and it alone, from being trained."""
    opened = None
    try:
        opened = open_job(base, work, watch, subject)
        if isinstance(opened, dict):
            return opened
        with closing(opened):
            return opened.run_to_end()
    except StopRequested:
        raise
    except (EngineError, DataError) as error:
        if opened is not None:
            # Bad data in training may have met one rank alone, and the others would wait for it without end.
            if isinstance(error, DataError) and base.world.size > 1:
                raise
            base.restore()
        return bare(error)
