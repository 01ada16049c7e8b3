"""What the fleet costs by itself at thousands of subjects; `benchmarks/fleet.py scale` runs this."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = 4


@contextmanager
def timed(found: dict[str, float], name: str, per: int = 1, factor: float = 1.0) -> Iterator[None]:
    """Processor seconds of a block, times `factor`, over `per`, kept under a name."""
    begin = time.process_time()
    yield
    found[name] = round((time.process_time() - begin) * factor / per, 4)


def measure(subjects: int, workers: int, folder: Path) -> dict:
    """Milliseconds of processor time a subject for each thing a driver does, commits a second, memory, status time."""
    from dbtrain.fleet.books import read_view
    from dbtrain.fleet.ledger import Ledger
    from dbtrain.fleet.schedule import Idle, Limits, schedule
    from dbtrain.subjects.manifest import read_manifest
    from dbtrain.values import Subject

    out = Path(tempfile.mkdtemp(prefix="dbtrain-scale-", dir=folder))
    found: dict[str, float] = {"subjects": subjects, "workers": workers}
    entries = [Subject(f"s{n:06d}", f"class{n % 50}", (), identifier="sks") for n in range(subjects)]
    with timed(found, "read_manifest_ms_a_subject", subjects, 1e3):
        read_manifest(write_manifest(out, subjects))
    ledger = Ledger(out, create=True)
    with timed(found, "enter_ms_a_subject", subjects, 1e3), ledger.commit():
        about = {"config": "{}", "config_digest": "", "manifest": "", "manifest_digest": ""}
        ledger.create_run(about, entries)
    index = rows_of(subjects)
    with timed(found, "read_view_ms_a_subject", subjects, 1e3):
        view = read_view(ledger)
    spent, wall = {"schedule": 0.0, "start": 0.0, "finish": 0.0}, 0.0
    idle, limits = [Idle(f"w{n}") for n in range(workers)], Limits(prior_parts=0)
    number = commits = 0
    result = {"run": "0" * 64, "files": {"pytorch_lora_weights.safetensors": "0" * 64}, "seconds": 1.0,
              "gpu_seconds": 1.0, "stages_s": {"train": 1.0, "save": 0.1}}  # fmt: skip
    while not view.empty:
        given = clocked(spent, "schedule", lambda: schedule(view, idle, workers, limits))
        for name, unit in given:
            number += 1

            def start(unit=unit, name=name, number=number) -> dict[int, int]:
                with ledger.commit():
                    attempts = ledger.start(number, unit.positions, name)
                    for subject in ledger.subjects(unit.positions):
                        index.entries_of(subject.id)
                return attempts

            begin = time.perf_counter()
            attempts = clocked(spent, "start", start)
            for position, attempt in attempts.items():

                def finish(position=position, attempt=attempt) -> None:
                    with ledger.commit():
                        assert ledger.finish(position, attempt, result)

                clocked(spent, "finish", finish)
            wall += time.perf_counter() - begin
            commits += 1 + len(attempts)
            view.end(unit)
    for name, seconds in spent.items():
        found[f"{name}_ms_a_subject"] = round(1e3 * seconds / subjects, 4)
    parts = ("read_manifest", "enter", "read_view", "schedule", "start")
    found["plan_and_schedule_ms_a_subject"] = round(sum(found[f"{part}_ms_a_subject"] for part in parts), 4)
    found["commits_per_s_one_subject_each"] = round(commits / wall)
    found["driver_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    ledger.close()
    found["ledger_mib"] = round(sum(path.stat().st_size for path in out.glob("ledger*")) / 2**20, 1)
    found.update(looks(out))
    return found


def write_manifest(out: Path, subjects: int) -> Path:
    """A manifest of that many subjects, four photos each (the same four)."""
    for i in range(PHOTOS):
        (out / f"{i}.jpg").touch()
    photos = ";".join(f"{i}.jpg" for i in range(PHOTOS))
    lines = ["subject,class,images", *(f"s{n:06d},class{n % 50},{photos}" for n in range(subjects))]
    (out / "photos.csv").write_text("\n".join(lines) + "\n")
    return out / "photos.csv"


def clocked(spent: dict[str, float], name: str, work: Callable):
    """What some work gives; its processor time is added to a name."""
    begin = time.process_time()
    value = work()
    spent[name] += time.process_time() - begin
    return value


def rows_of(subjects: int):
    """An index as large as that many subjects have."""
    from dbtrain.data.index import Entry, Index, make_key
    from dbtrain.values import Role

    rows = (Entry("train-000000.tar", make_key(f"s{n:06d}", Role.INSTANCE, i), 0, 512, "0" * 64, "")
            for n in range(subjects) for i in range(PHOTOS))  # fmt: skip
    return Index(tuple(rows), ())


def looks(out: Path) -> dict[str, float]:
    """Seconds to look at a run: as a function, as a command with its start-up, and all rows for a report."""
    from dbtrain.fleet.status import read_rows, summarize_run

    found: dict[str, float] = {}
    with timed(found, "summary_s"):
        summarize_run(out)
    with timed(found, "read_rows_s"):
        read_rows(out)
    begin = time.perf_counter()
    command = [sys.executable, "-m", "dbtrain", "batch", "status", str(out), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found["status_command_s"] = round(time.perf_counter() - begin, 3)
    assert json.loads(done.stdout)["subjects"]["finished"]
    return found
