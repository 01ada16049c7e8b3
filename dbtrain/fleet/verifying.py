"""Results that rotted after they were finished: found by their digests, and their subjects set waiting again."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from dbtrain.data.prefetch import ahead
from dbtrain.errors import DataError
from dbtrain.fleet.inbox import request
from dbtrain.fleet.lease import find_ledger
from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.run_folder import is_marked
from dbtrain.results.record import drop_record, finished_record
from dbtrain.storage.atomic import LOCK, held


def verify_run(out: Path) -> tuple[int, dict[str, str]]:
    """(number of finished subjects, what is wrong with those that rotted, by id).

    Every file is read and compared with the digests in its record and in the ledger. A subject whose result rotted
    waits again: a driver at work takes it up, else the next one does. Raises DataError, and changes nothing, where the
    folder is not the run's own on this machine: without its mount every result would seem to be lost.
    """
    folder = find_ledger(out)
    with closing(Ledger(folder)) as ledger:
        rows = [dict(row) for row in ledger.rows() if row["state"] == "finished"]
    if not rows:
        return 0, {}
    if not is_marked(out):
        raise DataError(f"{out}: is not the run's folder on this machine, or no driver has worked there; mount it")
    found = ahead(lambda row: (row["id"], _rot(out, row)), rows)
    rotten = {name: problem for name, problem in found if problem is not None}
    gone = [name for name in rotten if _give_up(out / "subjects" / name)]
    if gone:
        request(folder, "rot", gone)
    return len(rows), {name: rotten[name] for name in gone}


def _rot(out: Path, row: dict[str, Any]) -> str | None:
    """What is wrong with a finished subject's result; None if nothing is. A disk that refuses raises its OSError."""
    try:
        record = finished_record(out / "subjects" / row["id"])
    except DataError as error:
        return str(error).partition("; ")[0]
    if record["files"] != json.loads(row["files"]):
        return f"{out / 'subjects' / row['id']}: its record names other files than the ledger"
    return None


def _give_up(folder: Path) -> bool:
    """Whether a result no longer counts as finished; False if a process is at work on the subject."""
    with held(folder / LOCK) as ours:
        if ours:
            drop_record(folder)
        return ours
