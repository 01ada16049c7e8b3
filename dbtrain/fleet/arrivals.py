"""Subjects that join a run while its driver works (`batch run --watch`): rows of new and changed manifests.

A look costs what is new: files that have not changed are not read, and photos that are in the shards are not touched.
What else may change in a run that lives (photos that join a subject, more steps, rows that are gone) is taken in by the
next start, as without --watch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dbtrain.data.index import Index
from dbtrain.data.shards import grow_shards
from dbtrain.errors import DataError
from dbtrain.fleet.ledger import ENTER, Ledger, encode_subject
from dbtrain.fleet.living import stored_photos, with_identifiers
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.finding import Finding, defects, notes
from dbtrain.subjects.forgotten import not_forgotten
from dbtrain.subjects.manifest import join_scans, manifest_files, scan_file, scan_manifest
from dbtrain.subjects.preflight import sift
from dbtrain.subjects.registry import REGISTRY, recorded_identifiers
from dbtrain.subjects.sharding import photo_samples
from dbtrain.values import Subject

LOOK_S = 1.0
"""Seconds between two looks. A file that changed between them may still be being written, and is read a look later."""
AGAIN_S = 15.0
"""Seconds after which a file with a defect is read again: its photos may have been on their way."""


def wait_for_first(manifest: Path, config: RunConfig, say: Callable[[str], None]) -> None:
    """Wait until a manifest has a sound row."""
    said = False
    while not scan_manifest(manifest, config.data.shards is None)[0]:
        if not said:
            say(f"{manifest}: no subject yet; waiting for the first")
        said = True
        time.sleep(LOOK_S)


class Arrivals:
    """What has been seen of a run's manifest, a file or a folder of files."""

    def __init__(self, manifest: Path, config: RunConfig, out: Path, say: Callable[[str], None]):
        self.manifest, self.config, self.out, self.say = manifest, config, out, say
        self.registry = Path(config.identifier.registry or out / REGISTRY)
        self.stamps: dict[Path, tuple[int, int]] = {}
        self.read: dict[Path, tuple[int, int]] = {}
        self.again: dict[Path, float] = {}
        """Files with a defect, and when each is read again."""
        self.taken: dict[str, str] = {}
        """The file of each id, in small letters."""
        self.said: set[str] = set()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that identifiers are chosen in, loaded for the first subject that joins."""
        from dbtrain.models.load import load_tokenizer  # loads torch, which takes a restart seconds

        return load_tokenizer(self.config.model.single_file_layout or self.config.model.path)

    def take(self, ledger: Ledger, index: Index) -> tuple[Index, list[tuple[str, int]]]:
        """(the index, (class, position) of each subject that has joined and waits now).

        A row with a defect is told once, and looked at again from time to time. It keeps no other from joining.
        """
        files = self._changed()
        if not files:
            return index, []
        subjects, findings = join_scans(((file, scan_file(file)) for file in files), self.taken)
        known = {row[0] for row in ledger.db.execute("SELECT id FROM subjects WHERE state != 'skipped'")}
        new, findings = not_forgotten([each for each in subjects if each.id not in known], findings, self.out)
        new, findings = sift(new, findings, self.config, self.tokenizer, self.registry)
        self._tell(findings, files)
        if not new:
            return index, []
        try:
            index = grow_shards(photo_samples(new, self.config.data), self.out / "shards", index)
        except DataError as error:
            self._tell([Finding("", str(files[0]), str(error), "it is tried again")], files)
            return index, []
        return index, self._enter(ledger, new, index)

    def _enter(self, ledger: Ledger, new: Sequence[Subject], index: Index) -> list[tuple[str, int]]:
        """Enter subjects whose photos are stored; a kill before this leaves them to the next start."""
        config = self.config
        names = recorded_identifiers(self.registry, self.tokenizer, new, config.identifier.tokens, config.seed)
        stored = stored_photos(Index(tuple(row for each in new for row in index.entries_of(each.id)), ()))
        joined = []
        with ledger.commit():
            for each in with_identifiers(new, names):
                # A row that was left out at the start stands in the ledger, with its reason; nothing else of it does.
                ledger.db.execute("DELETE FROM subjects WHERE id=?", (each.id,))
                row = (None, each.id, each.class_noun, encode_subject(each), "waiting", None)
                joined.append((each.class_noun, ledger.db.execute(ENTER, row).lastrowid or 0))
            ledger.note_photos(stored)
        self.say(f"{len(new)} subjects join the run")
        return joined

    def _changed(self) -> list[Path]:
        """Files to read now: they have not changed since the last look, and were not read so."""
        now, before, self.stamps = time.monotonic(), self.stamps, {}
        for file in manifest_files(self.manifest) if self.manifest.is_dir() else [self.manifest]:
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            self.stamps[file] = status.st_mtime_ns, status.st_size
        quiet = [file for file, stamp in self.stamps.items() if before.get(file) == stamp]
        due = [file for file in quiet
               if self.read.get(file) != self.stamps[file] or self.again.get(file, now + 1) < now]  # fmt: skip
        for file in due:
            self.read[file] = self.stamps[file]
            self.again.pop(file, None)
        return due

    def _tell(self, findings: Sequence[Finding], files: Sequence[Path]) -> None:
        """Say what is wrong, once, and note which files to read again."""
        lines = [f"note: {each.line()}" for each in notes(findings)]
        lines += [f"left out: {each.line()}" for each in defects(findings)]
        for line in lines:
            if line not in self.said:
                self.said.add(line)
                self.say(line)
        if defects(findings):
            self.again |= dict.fromkeys(files, time.monotonic() + AGAIN_S)
