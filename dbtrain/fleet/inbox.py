"""Requests to a run from another terminal. A living driver finds them in its inbox; without one they apply now."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError
from dbtrain.fleet.lease import Lease, is_driven
from dbtrain.fleet.ledger import Ledger
from dbtrain.storage.atomic import write_file

INBOX = "requests"
RULES = {
    "cancel": (["waiting"], "cancelled", "cancelled on request"),
    "retry": (["quarantined", "cancelled"], "waiting", "retried on request"),
    "rot": (["finished"], "waiting", "its result rotted after it was finished"),
}
"""From which states each request takes a subject, where to, and the reason that is kept."""


def request(folder: Path, verb: str, ids: Sequence[str] | None) -> int | None:
    """How many subjects a request changed; None if it was left for the driver that is at work.

    ids: None is all. Raises DataError for ids that the run does not have.
    """
    with closing(Ledger(folder)) as ledger:
        known = ledger.ids()
        unknown = [name for name in ids or () if name not in known]
        if unknown:
            raise DataError(f"{folder}: its run has no subject {unknown[0]!r}")
        asked = {"verb": verb, "ids": None if ids is None else list(ids)}
        if is_driven(folder):
            (folder / INBOX).mkdir(exist_ok=True)
            name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"
            write_file(folder / INBOX / name, json.dumps(asked).encode())
            return None
        lease = Lease(folder)
        try:
            with ledger.commit():
                return len(apply(ledger, asked))
        finally:
            lease.release()


def apply(ledger: Ledger, asked: dict[str, Any]) -> list[tuple[int, str]]:
    """(position, class) of the subjects that a request changes now."""
    changed = ledger.settle(asked["ids"], *RULES[asked["verb"]])
    if asked["verb"] == "rot":
        ledger.forget_after([position for position, _ in changed])
    return changed


def take_requests(ledger: Ledger, folder: Path) -> list[tuple[str, list[tuple[int, str]]]]:
    """(verb, what it changed) of every request in a run's inbox, oldest first; the inbox is empty afterwards.

    The change is durable before a request is removed, and applying one twice changes nothing more.
    """
    paths = sorted((folder / INBOX).glob("*.json")) if (folder / INBOX).is_dir() else []
    changes = []
    if paths:
        with ledger.commit():
            for asked in [json.loads(path.read_text()) for path in paths]:
                changes.append((asked["verb"], apply(ledger, asked)))
    for path in paths:
        path.unlink()
    return changes
