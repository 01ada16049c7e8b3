"""The fleet under fire and at size.

    python benchmarks/fleet.py kills --subjects 1000 --kills 300 --seed 0
    python benchmarks/fleet.py soak --subjects 1000 --kills 2000      # the same under a result of its own
    python benchmarks/fleet.py kills --subjects 1000 --kills 75 --seed 3 --pause 2.6 --name "kills slowly"
    python benchmarks/fleet.py scale --subjects 10000
    python benchmarks/fleet.py start --rounds 5
    python benchmarks/fleet.py watch --subjects 120 --minutes 5
    python benchmarks/fleet.py living --subjects 100 --kills 60

`kills` trains tiny subjects (a random Stable Diffusion, a checkpoint each step) twice, undisturbed and under seeded
SIGKILLs of trainers (with --gang, members of gangs), their warm parents, actors and the driver, which is started again
by the same command each time. Every fourth kill comes at the first instant: as soon as a fresh process of that kind is
seen. It reports subjects lost, duplicated and blamed, adapters on the disk that differ from the undisturbed run's,
throughput kept, how many kills were answered and how soon, and what survives each kill.
`watch` is a service: subjects come to `batch run --watch` at random moments, with a restart halfway. `living` is
`kills` while rows, photos and steps join the run, compared with a run that knew everything from the start.
`start` measures what a driver's start and an actor's replacement cost each process, which a shared machine blurs least.
`scale` measures what the fleet itself costs at 10,000 subjects: no subject is trained.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
RESULTS = ROOT / "benchmarks/results/fleet_cpu_202611"
RECIPE = """
data: {resolution: 16}
train: {steps: 4, batch: 1, lr: 1.0e-3}
checkpoint: {every_steps: 1}
lora: {rank: 1}
prior: {images: 2, steps: 1, guidance: 1, batch: 2}
sample: {images: 0}
track: {tensorboard: false}
"""
CLASSES = ("dog", "cat", "vase", "car")


def make_job(folder: Path, subjects: int, photos: int = 1) -> tuple[Path, Path]:
    """(manifest, recipe) of made-up subjects and a random base, the smallest real thing."""
    from tests.kit.main_job import photo
    from tests.kit.random_models import make_sd

    rows = ["subject,class,images"]
    for number in range(subjects):
        name = f"s{number:05d}"
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(photos):
            photo(10 * number + i, 24, 20).save(folder / "photos" / name / f"{i}.jpg", quality=80)
        rows.append(f"{name},{CLASSES[number % len(CLASSES)]},photos/{name}")
    (folder / "photos.csv").write_text("\n".join(rows) + "\n")
    make_sd(folder / "sd")
    (folder / "recipe.yaml").write_text(RECIPE + f"model: {{path: {folder / 'sd'}}}\n")
    return folder / "photos.csv", folder / "recipe.yaml"


def kills(options: argparse.Namespace) -> dict:
    """The kill campaign's figures."""
    from fleet_kills import Campaign, audit, start_driver

    work = Path(tempfile.mkdtemp(prefix="dbtrain-kills-", dir=options.work))
    job = make_job(work, options.subjects)
    words = ["--workers", str(options.workers), "--hang", "60", "--losses", "100000", "--gang", str(options.gang),
             f"train.batch={options.gang}"]  # fmt: skip
    begin = time.monotonic()
    calm = start_driver(job, work / "calm", words)
    if calm.wait():
        raise SystemExit(f"the undisturbed run failed; see {work / 'calm'}.log")
    calm_s = time.monotonic() - begin
    pause_s = options.pause if options.pause is not None else calm_s / max(1, options.kills)
    campaign = Campaign(job, work / "out", words, options.seed, options.kills, pause_s, options.gang)
    stormy_s = campaign.run()
    found = {
        "subjects": options.subjects, "workers": options.workers, "gang": options.gang, "seed": options.seed,
        "kills": dict(campaign.done), "kills_total": sum(campaign.done.values()),
        "first_instant_kills": campaign.first_instant,
        "subjects_killed_with_a_checkpoint": campaign.with_a_checkpoint,
        "kills_per_min": round(60 * sum(campaign.done.values()) / stormy_s, 1),
        **audit(work / "out", work / "calm", options.subjects),
        "undisturbed_s": round(calm_s, 1), "disturbed_s": round(stormy_s, 1),
        "throughput_kept": round(calm_s / stormy_s, 3),
        "recovery_s": campaign.recovery(),
        "survivors_5_s_after_a_kill": campaign.survivors,
        "driver_mib_at_most": round(max(campaign.driver_mib)),
    }  # fmt: skip
    if not options.keep:
        shutil.rmtree(work)
    return found


def scale(options: argparse.Namespace) -> dict:
    """What the fleet costs by itself: planning, scheduling, committing and looking."""
    from fleet_scale import measure

    return measure(options.subjects, options.workers, Path(options.work or tempfile.gettempdir()))


def about() -> dict:
    """The machine and the versions that a result stands for."""
    import ray
    import torch

    from dbtrain.bench import commit

    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
            "torch": torch.__version__, "ray": ray.__version__, "commit": commit(),
            "command": shlex.join(["python", "benchmarks/fleet.py", *sys.argv[1:]])}  # fmt: skip


def write(name: str, found: dict) -> None:
    """Add a result to the result files, and print it."""
    path = RESULTS.with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {**found, "about": about()}
    path.write_text(json.dumps(known, indent=1) + "\n")
    lines = ["# The fleet on two CPU cores\n"]
    for title, values in known.items():
        rows = [f"| {key} | {json.dumps(value)} |" for key, value in values.items() if key != "about"]
        lines += [f"## {title}\n", "| figure | value |", "|---|---|", *rows, ""]
        lines += [f"- {key}: {value}" for key, value in values["about"].items()] + [""]
    RESULTS.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    print(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "soak", "scale", "start", "watch", "living"])
    parser.add_argument("--subjects", type=int, default=60)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gang", type=int, default=1)
    parser.add_argument("--pause", type=float, help="Mean seconds between kills; by default they fill the run.")
    parser.add_argument("--rounds", type=int, default=5, help="Deaths of each kind, for `start`.")
    parser.add_argument("--minutes", type=float, default=5, help="How long subjects keep coming, for `watch`.")
    parser.add_argument("--name", help="Name of the result; by default it is what is measured.")
    parser.add_argument("--work", help="Folder for scratch files.")
    parser.add_argument("--keep", action="store_true", help="Keep the scratch files.")
    parser.add_argument("--dry", action="store_true", help="Print only; leave the result files as they are.")
    options = parser.parse_args()
    from fleet_living import living, watch
    from fleet_start import start

    measures = {"kills": kills, "soak": kills, "scale": scale, "start": start, "watch": watch, "living": living}
    found = measures[options.what](options)
    if options.dry:
        print(json.dumps(found, indent=1))
    else:
        write(options.name or options.what + (f" gang {options.gang}" if options.gang > 1 else ""), found)


if __name__ == "__main__":
    main()
