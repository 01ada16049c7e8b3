"""Sixteen subjects: one packed run beside diffusers' train_dreambooth_lora.py run once for each of them.

    python benchmarks/pack_peers.py --script PATH/train_dreambooth_lora.py [--peer-path SITE] [--batch 1] [--steps 250]

Same base, photos, resolution, batch, rank, steps, rate, and number and making of priors (sampling steps, guidance);
processor seconds of whole process trees, on one thread, from nothing to the written adapters. The peer makes the
priors of each subject anew, as it does when it is run for a subject; a second figure takes its priors as given and
ours as made. Peers run between ours; a few of them stand for all, because they are equal in all but the photos.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import peers  # noqa: E402

from dbtrain.bench import commit  # noqa: E402
from dbtrain.subjects.manifest import read_manifest  # noqa: E402
from dbtrain.tiny import DEMO  # noqa: E402

SAMPLER_STEPS, GUIDANCE = 50, 7.5
"""What the peer's script makes its class images with."""


def manifest(folder: Path, subjects: int, classes: list[str]) -> list[tuple[str, Path]]:
    """(class, photos) of made-up subjects over the demo's photos, whose manifest is written to the folder."""
    photos = [subject.images[0].parent for subject in read_manifest(DEMO)]
    rows = [(classes[i % len(classes)], photos[i % len(photos)]) for i in range(subjects)]
    lines = [f"s{i:02d},{noun},{path}" for i, (noun, path) in enumerate(rows)]
    (folder / "photos.csv").write_text("\n".join(["subject,class,images", *lines]) + "\n")
    return rows


def ours(work: Path, arguments: argparse.Namespace, kind: str) -> list[str]:
    """Our command: all subjects, packed or one after another in one warm process."""
    out = work / f"ours-{kind}"
    shutil.rmtree(out, ignore_errors=True)
    return [sys.executable, "-m", "dbtrain", "train", str(work / "photos.csv"), "--subjects", "all", "--config", "tiny",
            "--out", str(out), "--quiet", f"engine.kind={kind}", f"engine.packed.size={arguments.size}",
            f"train.steps={arguments.steps}", f"train.batch={arguments.batch}", "train.lr=1e-3", "train.ema=null",
            f"lora.rank={peers.RANK}", "lora.targets=[attn*.to_q, attn*.to_k, attn*.to_v, attn*.to_out.0]",
            f"prior.images={arguments.priors}", f"prior.steps={SAMPLER_STEPS}", f"prior.guidance={GUIDANCE}",
            "prior.batch=16", "sample.images=0", "track.tensorboard=false"]


def measure(arguments: argparse.Namespace, work: Path, classes: list[str]) -> dict:
    """Processor seconds a subject: packed, warm solo, and the peer with priors made and given."""
    peers.BATCH, peers.PRIORS = arguments.batch, arguments.priors
    rows = manifest(work, arguments.subjects, classes)
    spent: dict[str, list[float]] = {"packed": [], "peer, priors made": [], "peer, priors given": [], "solo": []}
    for turn in range(arguments.turns):
        spent["packed"].append(peers.timed(ours(work, arguments, "packed"), [])[1] / len(rows))
        noun, photos = rows[turn % len(rows)]
        shutil.rmtree(work / "class", ignore_errors=True)
        for name in ("peer, priors made", "peer, priors given"):
            command = peers.theirs("lora", arguments.script, arguments.steps, work, photos, noun)
            spent[name].append(peers.timed(command, arguments.peer_path)[1])
        if not arguments.no_solo:
            spent["solo"].append(peers.timed(ours(work, arguments, "zero"), [])[1] / len(rows))
        print(turn, {name: round(values[-1], 2) for name, values in spent.items() if values}, flush=True)
    medians = {name: statistics.median(values) for name, values in spent.items() if values}
    return {"cpu_s_a_subject": medians, "runs": spent,
            "less_than": {name: value / medians["packed"] for name, value in medians.items()}}


def markdown(about: dict, result: dict) -> str:
    """The comparison as a table."""
    lines = ["# A pack beside diffusers' script, subject by subject", "",
             "| | processor seconds a subject, all in | times packed |", "|---|---|---|"]
    for name, value in result["cpu_s_a_subject"].items():
        lines.append(f"| {name} | {value:.2f} | {result['less_than'][name]:.2f} |")
    return "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in about.items()), ""])


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", required=True)
    parser.add_argument("--peer-path", action="append", default=[], help="folder for the peer's PYTHONPATH")
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--classes", default="dog,cat", help="class nouns that the subjects take in turn")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--priors", type=int, default=32)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--no-solo", action="store_true", help="leave our warm solo run of all subjects out")
    parser.add_argument("--work", type=Path, default=Path("bench-pack-peers"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "pack-peers_cpu_202611")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    classes = arguments.classes.split(",")
    result = measure(arguments, work, classes)
    import diffusers
    import torch

    about = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread used",
             "torch": torch.__version__, "diffusers": diffusers.__version__, "commit": commit(),
             "subjects": f"{arguments.subjects} of {' and '.join(classes)}, packs of {arguments.size}",
             "recipe": f"{arguments.batch} + {arguments.batch} images at 64 px, {arguments.steps} steps, rank "
                       f"{peers.RANK}, {arguments.priors} priors of {SAMPLER_STEPS} steps at guidance {GUIDANCE}",
             "turns": arguments.turns,
             "command": "python benchmarks/pack_peers.py --script PATH/train_dreambooth_lora.py " + " ".join(
                 f"--{name} {getattr(arguments, name)}" for name in ("subjects", "classes", "size", "steps", "batch",
                                                                    "priors", "turns"))}
    arguments.out.with_suffix(".json").write_text(json.dumps({"about": about, **result}, indent=1))
    arguments.out.with_suffix(".md").write_text(markdown(about, result))
    print(markdown(about, result))


if __name__ == "__main__":
    main()
