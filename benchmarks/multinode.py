"""A fleet over two hosts through Ray's job API, whole and with one host cut off and killed in the middle.

    python benchmarks/multinode.py --subjects 12

Hosts are network namespaces on this machine (root, iproute2, `ray[default]`), so times are of one machine's processors
and say nothing about a network. `--patient` keeps Ray's own limits for a node that does not answer (about 30 s);
otherwise they are those of tests/kit/two_hosts.py (about 4 s). Made for: is each subject finished once, are the weights
those of the undisturbed run, how long until a lost subject is taken up again.
"""

import argparse
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("", "kernels", "launchers")]

from safetensors.torch import load_file  # noqa: E402

from dbtrain.bench import commit  # noqa: E402
from tests.kit import two_hosts as hosts_of  # noqa: E402
from tests.kit.main_job import write_job  # noqa: E402


def rows(out: Path, query: str) -> list[tuple]:
    """What the ledger of an output folder answers; nothing before it exists."""
    if not (out / "ledger.sqlite").exists():
        return []
    with closing(sqlite3.connect(out / "ledger.sqlite", timeout=30)) as db:
        return db.execute(query).fetchall()


def run(folder: Path, words: list, out: Path, subjects: int, cut: bool) -> dict:
    """One run over two fresh hosts; its seconds, and what became of the subjects."""
    token = hosts_of.write_token(folder / f"{out.name}.token")
    with hosts_of.two_hosts() as hosts, hosts_of.ray_on(hosts, folder / "ray", token) as address:
        command = ["launch", "ray", "--address", address, "--", "batch", "run", *words, "--out", out, "--unit", "1"]
        begin = time.time()
        job = hosts[0].start(sys.executable, "-m", "dbtrain", *command, cwd=folder, stdout=subprocess.DEVNULL)
        when = None
        while job.poll() is None:
            time.sleep(0.1)
            done = rows(out, "SELECT count(*) FROM subjects WHERE state='finished'")
            open_now = rows(out, "SELECT count(*) FROM attempts WHERE outcome IS NULL")
            if cut and when is None and done and done[0][0] >= subjects // 3 and open_now[0][0] == 2:
                when = time.time()
                hosts[1].cut()
                hosts[1].kill()
        seconds = time.time() - begin
    finished = rows(out, "SELECT position, count(*) FROM attempts WHERE outcome='finished' GROUP BY position")
    lost = rows(
        out, "SELECT position, attempt, ended FROM attempts WHERE outcome='waiting' AND cause IN ('lost','killed')"
    )
    again = [
        rows(out, f"SELECT min(started) FROM attempts WHERE position={position} AND attempt>{attempt}")[0][0]
        for position, attempt, _ in lost
    ]
    return {
        "exit_code": job.returncode,
        "seconds": round(seconds, 1),
        "finished": len(finished),
        "finished_twice": sum(count > 1 for _, count in finished),
        "cut": when is not None,
        "noticed_s": [round(ended - when, 1) for _, _, ended in lost] if when else [],
        "taken_up_again_s": [round(start - when, 1) for start in again if start] if when else [],
    }


def largest_difference(one: Path, other: Path) -> float:
    """Of any weight of any subject between two output folders."""
    worst = 0.0
    for path in one.glob("subjects/*/pytorch_lora_weights.safetensors"):
        mine, theirs = load_file(path), load_file(other / path.relative_to(one))
        worst = max([worst, *(float((mine[name] - theirs[name]).abs().max()) for name in mine)])
    return worst


def main() -> None:
    """Run both and write down what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--patient", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "multinode_cpu_202611")
    arguments = parser.parse_args()
    why_not = hosts_of.missing() or hosts_of.missing_job_api()
    if why_not:
        raise SystemExit(why_not)
    if arguments.patient:
        hosts_of.QUICK_RAY.clear()
    folder = Path(tempfile.mkdtemp(prefix="dbm-"))
    try:
        names = " ".join(f"s{number:03d}:dog" for number in range(arguments.subjects))
        words = write_job(folder, f"train.steps={arguments.steps}", "sample.images=0", subjects=names)
        results = {
            name: run(folder, words, folder / name, arguments.subjects, name == "one host lost")
            for name in ("undisturbed", "one host lost")
        }
        results["largest difference of a weight"] = largest_difference(folder / "undisturbed", folder / "one host lost")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, two network namespaces, one worker each",
        **{name: version(name) for name in ("ray", "torch", "deepspeed")},
        "commit": commit(),
        "subjects": arguments.subjects,
        "steps": arguments.steps,
        "Ray's limits for a silent node": "its own" if arguments.patient else "4 x 0.5 s",
        "load of the machine at the end": os.getloadavg()[0],
    }
    arguments.out.with_suffix(".json").write_text(json.dumps({"about": about, **results}, indent=1))
    arguments.out.with_suffix(".md").write_text(markdown(about, results))
    print(markdown(about, results))


def markdown(about: dict, results: dict) -> str:
    """The results as a table."""
    keys = list(results["undisturbed"])
    lines = [
        "# A fleet over two hosts, one of them lost",
        "",
        "| figure | undisturbed | one host lost |",
        "|---|---|---|",
    ]
    for key in keys:
        lines.append(f"| {key} | {results['undisturbed'][key]} | {results['one host lost'][key]} |")
    worst = results["largest difference of a weight"]
    lines += ["", f"Largest difference of any weight between the two runs: {worst}.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    command = f"python benchmarks/multinode.py --subjects {about['subjects']} --steps {about['steps']}"
    return "\n".join([*lines, "", f"Made by `{command}`.", ""])


if __name__ == "__main__":
    main()
