"""Faults on order: every file operation struck, files damaged at rest, and what the proofs against that cost.

    python benchmarks/faults.py            # all of it into one table, about an hour on two cores
    python benchmarks/faults.py --small    # a look at each part, a few minutes
    python benchmarks/faults.py --only train --only preflight

A look and a part have files of their own, by their names, beside the table of all.
Work is begun in forks of one warm process, killed (or refused) at its n-th file operation, and begun again; the result
must have the digests of a run that nobody disturbed. The pieces are in `tests/faults/`, whose tests run a part of them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "launchers")]

import torch  # noqa: E402

from dbtrain.bench import commit  # noqa: E402
from dbtrain.subjects.manifest import scan_manifest  # noqa: E402
from dbtrain.subjects.sharding import shard_subjects  # noqa: E402
from tests.faults.campaigns import (  # noqa: E402
    TIMED,
    Tally,
    Works,
    damage_checkpoints,
    damage_priors,
    damage_shards,
    damage_sources,
    disturb,
    make_manifest,
)
from tests.faults.forgetting import forget_under_faults  # noqa: E402
from tests.faults.kit import forked  # noqa: E402
from tests.kit.main_job import small_config  # noqa: E402

ACTIONS = (("kill", False), ("cut", False), ("ENOSPC", True), ("EIO", False), ("SIGTERM", False))
PARTS = ("shards", "checkpoints", "import_priors", "import_kohya", "index_tar", "priors", "train", "packed")
WHOLE_RUNS = ("train", "packed")
OTHERS = ("forget", "damage", "preflight", "identifiers", "proofs")
MEANING = {
    "kill": "SIGKILL, a write torn",
    "cut": "power cut: SIGKILL, and what was not synced is lost",
    "ENOSPC from then on": "a disk that is full from there on",
    "EIO": "one operation fails",
    "SIGTERM": "a request to stop (75, or 0 at the end)",
}


def strikes(folder: Path, parts: list[str], small: bool) -> list[Tally]:
    """Every part of the program struck at its file operations."""
    works, found = Works(folder / "works"), []
    for part in parts:
        work = getattr(works, part)(folder / part)
        for action, forever in ACTIONS:
            if action == "SIGTERM" and part not in WHOLE_RUNS:
                continue
            stride = 12 if small else 1 if part not in WHOLE_RUNS or action == "kill" else 4
            found.append(disturb(part, work, folder / part, action, stride, forever))
            say(found[-1])
    return found


def forgettings(folder: Path, small: bool) -> list[Tally]:
    """A person forgotten, struck at every file operation."""
    found = []
    for action, forever in ACTIONS:
        if action != "SIGTERM":
            found.append(forget_under_faults(folder / f"forget-{action}", action, 12 if small else 1, forever=forever))
            say(found[-1])
    return found


def damages(folder: Path, small: bool) -> list[Tally]:
    """Checkpoints, shards and a prior store damaged at rest."""
    part = 20 if small else 1
    works = Works(folder / "damage")
    config = small_config()
    shard_subjects(*scan_manifest(works.manifest), folder / "sound", config, str)
    assert forked(works.priors(folder / "priors"), None, folder).code == 0
    found = []
    for tally in (
        damage_checkpoints(folder / "checkpoints", 500 // part, 100 // part),
        damage_shards(folder / "sound", 300 // part),
        damage_sources(folder / "sources", 100 // part),
        damage_priors(folder / "priors" / "store", 100 // part),
    ):
        found.append(tally)
        say(tally)
    return found


def preflight_cost(folder: Path, small: bool) -> dict:
    """Seconds and peak memory of `dbtrain preflight` over many subjects of five photos, in a process of its own."""
    count = 50 if small else 1000
    manifest = make_manifest(folder / "many", count, 5)
    code = (
        "import resource, sys, time; from dbtrain.settings.recipes import load\n"
        "from dbtrain.subjects.manifest import scan_manifest; from dbtrain.subjects.preflight import sift\n"
        "from pathlib import Path; config = load('tiny'); begin = time.perf_counter()\n"
        "subjects, findings = sift(*scan_manifest(Path(sys.argv[1])), config)\n"
        "print(len(subjects), len(findings), time.perf_counter() - begin,"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    rows = {}
    for subjects in (count // 10, count):
        lines = manifest.read_text().splitlines()[: subjects + 1]
        part = manifest.with_name(f"first-{subjects}.csv")
        part.write_text("\n".join(lines) + "\n")
        done = subprocess.run([sys.executable, "-c", code, part], capture_output=True, text=True, check=True, env=env())
        sound, findings, took_s, peak_mib = map(float, done.stdout.split())
        assert (sound, findings) == (subjects, 0)
        rows[subjects] = {"seconds": round(took_s, 1), "peak_mib": round(peak_mib)}
    return {"photos": "5 JPEG of 640 x 480 a subject", "subjects": rows}


def env() -> dict[str, str]:
    """The environment of a child that finds this checkout."""
    return {**os.environ, "PYTHONPATH": ":".join(sys.path[:3]), "OMP_NUM_THREADS": "1"}


def identifier_cost(small: bool) -> dict:
    """Seconds to allocate and record identifiers, and how many are different."""
    from dbtrain.models.load import load_tokenizer
    from dbtrain.subjects.registry import recorded_identifiers
    from dbtrain.values import Subject

    subjects = [Subject(f"s{number}", "dog", ()) for number in range(2000 if small else 50_000)]
    tokenizer = load_tokenizer("embedded")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        names = recorded_identifiers(Path(folder, "identifiers.jsonl"), tokenizer, subjects)
        took_s = time.perf_counter() - begin
    different = len({name.casefold() for name in names.values()})
    return {"subjects": len(subjects), "different": different, "seconds": round(took_s, 1)}


def verification_cost(folder: Path, small: bool) -> dict:
    """Share of a tiny run's time that goes into proving bytes: digests of samples, shards, checkpoints, latents."""
    from dbtrain.data import stream
    from dbtrain.priors import draw
    from dbtrain.results import checkpoint
    from dbtrain.settings.recipes import load
    from dbtrain.storage import kept_tensors
    from dbtrain.subjects import sharding
    from dbtrain.train import train_manifest

    spent: dict[str, float] = {}

    def clocked(module: object, name: str) -> None:
        real: Callable = getattr(module, name)

        def timed(*words: object, **named: object) -> object:
            begin = time.perf_counter()
            try:
                return real(*words, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin

        setattr(module, name, timed)

    for module, name in (
        (stream, "_row_problem"),
        (sharding, "verify"),
        (sharding, "source_digest"),
        (draw, "verify"),
        (kept_tensors, "_sound"),
        (checkpoint, "verify_checkpoint"),
        (checkpoint, "file_digest"),
    ):
        clocked(module, name)
    works = Works(folder / "cost")
    steps = 20 if small else 200
    config = load("tiny", [f"train.steps={steps}", f"checkpoint.every_steps={steps // 4}", "prior.images=40"])
    out = folder / "cost" / "out"
    begin = time.perf_counter()
    train_manifest(works.manifest, config, out, ["rex"], quiet=True)
    whole_s = time.perf_counter() - begin
    train_s = json.loads((out / "subjects" / "rex" / "record.json").read_text())["stages_s"]["train"]
    proof_s = sum(spent.values())
    return {
        "steps": steps,
        "run_s": round(whole_s, 2),
        "train_s": round(train_s, 2),
        "proofs_s": round(proof_s, 3),
        "share_of_training": round(proof_s / train_s, 4),
        "by_function_s": {name: round(value, 4) for name, value in spent.items()},
    }


def title(chosen: list[str] | None, small: bool) -> str:
    """The name of a run's files: of all, of the chosen parts, or of a look at them."""
    words = ["faults", *(sorted(set(chosen or ()))), *(["small"] if small else [])]
    return f"{'-'.join(words)}_cpu_{time.strftime('%Y%m')}"


def say(tally: Tally) -> None:
    """One line on a campaign as it ends."""
    print(f"{tally.name}: {tally.good} of {tally.cases}", *tally.wrong[:3], sep="\n  ", flush=True)


def table(tallies: list[Tally]) -> str:
    """The campaigns as a Markdown table."""
    rows = ["| campaign | file operations | cases | as it must be |", "|---|---|---|---|"]
    for one in tallies:
        name, _, action = one.name.partition(": ")
        what = f"{name}: {MEANING[action]}" if action else name
        rows.append(f"| {what} | {one.operations or ''} | {one.cases} | {one.good} |")
    return "\n".join(rows)


def report(tallies: list[Tally], costs: dict, about: dict) -> str:
    """The whole result as Markdown."""
    costs_text = "\n".join(f"- {name}: `{json.dumps(value)}`" for name, value in costs.items())
    about_text = "\n".join(f"- {name}: {value}" for name, value in about.items())
    return f"""# Faults on order

Work is struck at a file operation, then the same work is done again. As it must be: it ends by the signal, or with one
line and exit code 3; and the second time gives the SHA-256 of every file of a run that nobody disturbed, with nothing
half-written left. Compared is every file but locks and those that hold times ({", ".join(TIMED)}).

`train` is a whole run: shards, identifiers, priors, encoded priors, checkpoints, adapter, samples, card. `packed` is
one of two subjects in a pack, whose banks and results two more threads take care of, so that the order of operations
varies; its writer goes on after a checkpoint that failed, so that after an error no checkpoints are compared. Damage
at rest must be named by `verify`, and reading must raise or give the very bytes; a damaged checkpoint must be passed
over for the one before. `forget` removes a person from a finished run, and the copy of it that was uploaded: done
again, no byte of the person's photos, pictures and weights, no name and no digest of them may be found in any file,
also not in tars, pictures or the ledger's free pages, and the others' files must have every bit.

{table(tallies)}

## What it costs

{costs_text}

## Measured on

{about_text}

Made by `{about["command"]}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a part of each campaign")
    parser.add_argument("--only", action="append", choices=[*PARTS, *OTHERS], help="a part; repeat for more")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    words = parser.parse_args()
    torch.set_num_threads(1)
    chosen = words.only or [*PARTS, *OTHERS]
    begin, costs = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tallies = strikes(folder, [part for part in PARTS if part in chosen], words.small)
        if "forget" in chosen:
            tallies += forgettings(folder, words.small)
        if "damage" in chosen:
            tallies += damages(folder, words.small)
        if "preflight" in chosen:
            costs["preflight"] = preflight_cost(folder, words.small)
        if "identifiers" in chosen:
            costs["identifiers"] = identifier_cost(words.small)
        if "proofs" in chosen:
            costs["proofs in a tiny run"] = verification_cost(folder, words.small)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": commit(),
        "seconds": round(time.perf_counter() - begin),
        "command": " ".join(["python", "benchmarks/faults.py", *sys.argv[1:]]),
    }
    words.out.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "campaigns": [one.row() for one in tallies], "costs": costs}
    result = words.out / title(words.only, words.small)
    result.with_suffix(".json").write_text(json.dumps(content, indent=1))
    result.with_suffix(".md").write_text(report(tallies, costs, about))
    print(json.dumps(costs, indent=1))
    wrong = sum(one.cases - one.good for one in tallies)
    print(f"{sum(one.cases for one in tallies)} cases, {wrong} not as they must be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
