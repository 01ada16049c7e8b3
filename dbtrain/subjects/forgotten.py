"""Subjects that were forgotten in a run: their tombstones, and what is still to be removed.

`forgotten.jsonl` (sealed lines) holds a random key, and for each forgotten id a name made from its HMAC under that key:
enough to know the id again, and not the id. `forgetting.json` stands from before the first removal until after the
last one. It names who is being forgotten, and the words that lead to them in files that subjects share.
"""

import hmac
import json
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dbtrain.errors import DataError
from dbtrain.storage.atomic import held, sync_folder, write_file
from dbtrain.storage.sealed import seal, unseal
from dbtrain.subjects.finding import Finding
from dbtrain.values import Subject

TOMBSTONES, PENDING = "forgotten.jsonl", "forgetting.json"
FORMAT = "dbtrain-forgotten"
STATE = "forgotten"
"""State of a forgotten subject in the ledger, and the beginning of its tombstone's name."""


@dataclass(frozen=True)
class Tombstones:
    """The forgotten subjects of a run, by the names of their tombstones. key: of the HMAC, in hexadecimal."""

    key: str
    names: frozenset[str] = frozenset()

    def name(self, subject: str) -> str:
        """The name of a subject's tombstone."""
        digest = hmac.new(bytes.fromhex(self.key), subject.casefold().encode(), "sha256").hexdigest()
        return f"{STATE}-{digest[:16]}"

    def __contains__(self, subject: str) -> bool:
        return self.name(subject) in self.names


def read_tombstones(out: Path) -> Tombstones:
    """The tombstones of a run; with a new key where there are none. Raises DataError for a damaged file."""
    path = out / TOMBSTONES
    if not path.exists():
        return Tombstones(secrets.token_hex(16))
    try:
        header, *names = unseal(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: is damaged ({error}); put a copy back, or forget its subjects again") from error
    return Tombstones(header["key"], frozenset(names))


def bury(out: Path, subjects: Iterable[str]) -> Tombstones:
    """The tombstones of a run, with those of these subjects, which are on the disk now."""
    before = read_tombstones(out)
    stones = Tombstones(before.key, before.names | {before.name(subject) for subject in subjects})
    if stones != before:
        write_file(out / TOMBSTONES, seal([{"format": FORMAT, "key": stones.key}, *sorted(stones.names)]))
    return stones


def read_pending(out: Path) -> dict[str, list[str]]:
    """Who is being forgotten in a run, each with the words that lead to it; empty if nobody is."""
    path = out / PENDING
    return dict(json.loads(path.read_text())) if path.exists() else {}


def change_pending(out: Path, more: Mapping[str, Sequence[str]], done: Collection[str] = ()) -> None:
    """Note who else is to be forgotten, and who is now; the note of nobody is removed."""
    with held(out / f".{PENDING}.lock", wait=True):
        pending = {name: words for name, words in {**read_pending(out), **more}.items() if name not in done}
        if pending:
            write_file(out / PENDING, json.dumps(pending).encode())
        else:
            (out / PENDING).unlink(missing_ok=True)
            sync_folder(out)


def refuse_pending(out: Path) -> None:
    """Raise DataError where the forgetting of a subject has begun and has not ended."""
    if pending := read_pending(out):
        what = f"{out}: {len(pending)} subjects are being forgotten"
        raise DataError(f"{what}; run `dbtrain forget --out {out}` to its end")


def not_forgotten(
    subjects: Iterable[Subject], findings: Iterable[Finding], out: Path
) -> tuple[list[Subject], list[Finding]]:
    """The rows of a manifest without those of forgotten subjects, with a note for each of these."""
    stones = read_tombstones(out)
    rows, found = list(subjects), [finding for finding in findings if finding.subject not in stones]
    what = "was forgotten here on request, and is left out"
    told = [Finding(row.id, str(out), what, "take its row out, or choose another --out", note=True)
            for row in rows if row.id in stones]  # fmt: skip
    return [row for row in rows if row.id not in stones], found + told
