"""A ledger that takes what joins a run: rows, photos and steps. Nothing that is finished is lost by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dbtrain.data.index import Index
from dbtrain.errors import ConfigError, DataError, shown
from dbtrain.fleet.ledger import ENTER, KEPT_FIELDS, Ledger, decode_subject, encode_subject
from dbtrain.results.identity import Identity, Relation, difference, relation
from dbtrain.settings.config import RunConfig
from dbtrain.settings.marks import deciding
from dbtrain.values import Subject

GONE = "its row was taken out of the manifest"
REOPEN = (
    "UPDATE subjects SET state='waiting', reason=?, cause=NULL, failures=0, losses=0, pack=NULL, class=?, spec=? "
    "WHERE position=?"
)


def settings_relation(run: Mapping[str, Any], config: RunConfig, digest: str, out: Path) -> Relation:
    """How the settings of a run relate to those that are wanted now: the same, or the same for more steps.

    Raises ConfigError, which names the settings, for any other.
    """
    if run["config_digest"] == digest:
        return Relation.SAME
    made = Identity(run["config_digest"], {"settings": deciding(RunConfig.model_validate_json(run["config"]))})
    wanted = Identity(digest, {"settings": deciding(config)})
    if (how := relation(made, wanted)) is not Relation.LONGER:
        raise ConfigError(f"{out}: holds a run with other settings ({difference(made, wanted)}); use another --out")
    return how


def photos_digest(subjects: Iterable[Subject]) -> str:
    """One sha256 of names, sizes and times of all photos; a new one says that photos may have joined."""
    digest = hashlib.sha256()
    for subject in subjects:
        for path in subject.images:
            status = path.stat()
            digest.update(json.dumps([subject.id, path.name, status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


def refuse_changed_rows(ledger: Ledger, subjects: Iterable[Subject], out: Path) -> None:
    """Raise DataError for each row of the manifest that says something else than when it was entered; more steps may
    be asked for."""
    entered = {row["id"]: row for row in ledger.rows() if row["state"] != "skipped"}
    told = []
    for subject in subjects:
        if subject.id in entered:
            before = decode_subject(entered[subject.id]["spec"])
            for name in KEPT_FIELDS:
                old, new = getattr(before, name), getattr(subject, name)
                given = name == "identifier" and new is None  # the one that it was given holds
                more = name == "steps" and None not in (old, new) and new >= old
                if old != new and not given and not more:
                    told.append(f"{out}: {subject.id}: {name} was {shown(old)}, is {shown(new)}; put it back, or give "
                                "the row another id")  # fmt: skip
    if told:
        raise DataError("\n".join(told))


def take_in(
    ledger: Ledger,
    about: Mapping[str, str | None],
    subjects: Sequence[Subject],
    skipped: Mapping[str, str],
    photos: Mapping[str, str],
    longer: bool,
    say: Callable[[str], None],
) -> None:
    """Enter what has joined a run, in one commit.

    about: settings and manifest as they are now. subjects: the sound rows, with the identifiers that they were given.
    skipped: reasons of rows that are left out, by id. photos: see `stored_photos`. longer: whether `train.steps` has
    grown. Subjects with more photos or steps wait again; their results stay until the new ones are
    whole.
    """
    entered = {row["id"]: row for row in ledger.rows()}
    position = 1 + max((row["position"] for row in entered.values()), default=-1)
    joined = reopened = 0
    with ledger.commit():
        for subject in subjects:
            row, spec = entered.get(subject.id), encode_subject(subject)
            if row is None:
                ledger.db.execute(ENTER, (position, subject.id, subject.class_noun, spec, "waiting", None))
                position, joined = position + 1, joined + 1
            elif why := _why_again(row, subject, photos.get(subject.id), longer):
                ledger.db.execute(REOPEN, (why, subject.class_noun, spec, row["position"]))
                ledger.forget_after([row["position"]])
                reopened += 1
        for name, reason in skipped.items():
            if name not in entered:
                ledger.db.execute(ENTER, (None, name, None, "{}", "skipped", reason))
        gone = entered.keys() - {subject.id for subject in subjects} - skipped.keys()
        gone = {name for name in gone if entered[name]["state"] not in ("skipped", "forgotten")}
        ledger.note_photos(photos)
        ledger.settle(sorted(gone), ["waiting"], "cancelled", GONE)
        ledger.db.execute(
            "UPDATE run SET config=:config, config_digest=:config_digest, manifest=:manifest, "
            "manifest_digest=:manifest_digest, photos_digest=:photos_digest",
            about,
        )
    if joined or reopened:
        say(f"{joined} subjects join the run, and {reopened} wait again for more photos or steps")
    if gone:
        say(f"{len(gone)} subjects have no row any more, as {min(gone)}; what is there of them is left alone")


def _why_again(row: Any, subject: Subject, photos: str | None, longer: bool) -> str | None:
    """Why a subject of the run is to wait again; None if it is not."""
    if row["state"] == "skipped":
        return "its row is sound now"
    if row["state"] == "cancelled" and row["reason"] == GONE:
        return "its row is back"
    if row["photos"] not in (None, photos):
        return "photos have joined it"
    before = decode_subject(row["spec"])
    if (subject.steps or 0) > (before.steps or 0) or (longer and subject.steps is None):
        return "more steps are wanted"
    return None


def stored_photos(index: Index) -> dict[str, str]:
    """One digest of each subject's stored photos, by id."""
    digests = {name: "".join(entry.sha256 for entry in index.entries_of(name)) for name in index.subjects}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in digests.items()}


def with_identifiers(subjects: Iterable[Subject], names: Mapping[str, str]) -> list[Subject]:
    """Subjects with the identifiers that they were given."""
    return [replace(subject, identifier=names[subject.id]) for subject in subjects]
