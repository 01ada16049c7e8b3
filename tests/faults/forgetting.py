"""Forgetting struck at its file operations: what is left of the person, and of the others, after the same again."""

import json
import shutil
from pathlib import Path

from dbtrain.data.stream import verify
from dbtrain.fleet.forgetting import forget
from dbtrain.results.upload import NOTE
from dbtrain.subjects.forgotten import PENDING
from tests.faults.campaigns import ENDS, Tally, half_written
from tests.faults.kit import Fault, forked, trace
from tests.kit.forgettable import PERSON, fresh, make_forgettable, needles, neighbours, traces


def begin(template: Path, run: Path) -> None:
    """Make a copy of a run, and beside it the copy of its person that was uploaded."""
    place, store = fresh(template, run) / "subjects" / PERSON, run.parent / "store" / PERSON
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(place, store)
    (place / NOTE).write_text(json.dumps({str(store): ["0" * 64]}))


def forget_under_faults(folder: Path, action: str, stride: int = 1, first: int = 1, forever: bool = False) -> Tally:
    """Strike at every `stride`-th operation of a forgetting, from the `first`; then forget again, undisturbed.

    Good: the strike ended the work as it must, and afterwards nothing of the person is found, also of a copy that was
    uploaded, the others' files have every bit, and nothing half-written is left.
    """
    template = make_forgettable(folder)
    wanted, kept, run = needles(template, folder / "input"), neighbours(template), folder / "copy" / "run"
    tally = Tally(f"forget: {action}{' from then on' if forever else ''}")

    def work():
        forget(run, [PERSON])

    begin(template, run)
    tally.operations = len(trace(work, run.parent))
    for at in range(first, tally.operations + 1, stride):
        begin(template, run)
        struck = forked(work, Fault(action, at, forever=forever), run.parent)
        ended = struck.code in ENDS.get(action, (0, 3)) and "Traceback" not in struck.stderr
        again = forked(work, None, run.parent)
        left, same = traces(run.parent, wanted), neighbours(run) == kept
        clean = not half_written(run) and not verify(run / "shards") and not (run / PENDING).exists()
        good = ended and again.code == 0 and not left and same and clean
        last = struck.operations[-1] if struck.operations else "?"
        tally.count(good, f"operation {at} ({last}): ended {struck.code}, again {again.code}, left {left[:3]}, "
                          f"others {same}, clean {clean}; {struck.stderr[-200:]} {again.stderr[-200:]}")  # fmt: skip
    return tally
