"""Whether two commits compute the same bits: the same small trainings by both, every number and every tensor compared.

    python benchmarks/same_bits.py BEFORE AFTER [--only sd-lora,sdxl-packed] [--out FILE]
    python benchmarks/same_bits.py TREE --record FILE      # keep what one tree computes
    python benchmarks/same_bits.py TREE --against FILE     # compare a tree with that

BEFORE, AFTER and TREE are folders of a checkout, taken as they are, or commits, checked out for the time being.
Trees are used through the command line, their recipe `tiny` and the files they write, so modules may have moved.
Photos and the random SDXL come from the checkout of this script.
Each case trains a few subjects of the demo for 6 steps, on the embedded base (sd) or a random SDXL (sdxl).
Compared are: losses, gradient norm and learning rate of each step; each tensor (dtype, shape, bytes) of adapters,
models, checkpoints and kept latents; digests of pictures, shards, indexes, identifiers and prior keys. Records,
cards, settings and metadata, which name versions, times and folders, are not.

It prints a line a case. Exit code: 0 the same, 1 a difference or a case that failed, 2 nothing to compare.
One thread a process, `--jobs` cases at a time. Bits hold on one machine: a record knows processor and libraries.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from runpy import run_module
from typing import NamedTuple

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "dbtrain" / "tiny" / "assets" / "demo"
SOURCES = ("", "kernels", "launchers", "embedded")
"""Folders of a tree that Python reads; one that a tree has not is no harm."""
SUBJECTS = {"real-dog": "dog", "dog-tan": "dog", "car-red": "car"}
LIBRARIES = ("torch", "deepspeed", "diffusers", "transformers", "safetensors", "numpy", "pillow")
PIPELINES = "diffusers.pipelines.stable_diffusion{0}.pipeline_stable_diffusion{0}"
LOADED = ["torch", "deepspeed", PIPELINES.format(""), PIPELINES.format("_xl")]
"""Loaded once, in the process that all others are forked from; our own packages never are."""
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONDONTWRITEBYTECODE"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
}
WARM = multiprocessing.get_context("forkserver")
NUMBERS = ("loss", "loss_instance", "loss_prior", "grad_norm", "lr")
WHOLE_FILES = (".png", ".tar", "index.jsonl", "identifiers.jsonl", "key.json")
"""Ends of the names of files that are compared as they are."""
TIMEOUT_S = 900
SHOWN = 4
"""Differences shown of one case; all are in `--out`."""

COMMON = """
train.steps=6 train.batch=4 prior.images=4 prior.steps=4 sample.images=1 sample.steps=2
track.every_steps=1 track.tensorboard=false checkpoint.every_steps=3
"""
BASES = {"sd": "", "sdxl": "model.family=sdxl model.path=sdxl data.resolution=32"}
FULL = "train.method=full train.lr=1e-4 publish.dtype=fp32 "
RICH = """
train.ema=0.9 train.schedule=cosine train.warmup_steps=2 prior.weight=0.5 objective.weighting=min_snr
objective.noise_offset=0.1 objective.timesteps=stratified data.crop=random data.flip=true data.cache_latents=false
"""


class Case(NamedTuple):
    """A training: its settings, how many of the subjects, ranks, and whether the results are used afterwards."""

    settings: str
    subjects: int = 1
    ranks: int = 1
    use: bool = False


CASES = {
    "lora": Case("", 2),
    "lora-text": Case("train.text_encoder=true train.text_encoder_lr=1e-3", use=True),
    "lora-rich": Case(RICH + "train.micro_batch=2"),
    "lora-bf16": Case(
        "train.precision=bf16 train.gradient_checkpointing=true prior.sampler=ddpm "
        "objective.weighting=debiased objective.timesteps=logit_normal"
    ),
    "packed": Case("engine.kind=packed engine.packed.size=3", 3),
    "packed-rich": Case(RICH + "engine.kind=packed engine.packed.size=2 train.text_encoder=true", 3),
    "full-zero2": Case(FULL + "engine.zero.stage=2"),
    "full-zero3": Case(FULL + "engine.zero.stage=3"),
    "ranks-zero2": Case(FULL + "engine.zero.stage=2", ranks=2),
    "ranks-zero3": Case("engine.zero.stage=3", ranks=2),
}
NAMES = [f"{base}-{case}" for base in BASES for case in CASES]


def make_inputs(folder: Path, log: Path) -> None:
    """Make photos, their manifest and a random SDXL, for all trees the same; with this script's checkout."""
    enter(ROOT, folder, log)
    from tests.kit.random_models import make_sdxl

    rows = [("subject", "class", "images")]
    for subject, noun in SUBJECTS.items():
        (folder / subject).mkdir()
        rows.append((subject, noun, subject))
        for path in sorted((DEMO / subject).iterdir()):
            image = Image.open(path).convert("RGB")
            # The demo's photos are square, which would leave a random crop no choice.
            image.crop((0, 0, image.width, image.height * 7 // 8)).save(folder / subject / f"{path.stem}.png")
    with (folder / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    make_sdxl(folder / "sdxl")


def origin(inputs: Path) -> dict[str, str]:
    """What the bits depend on besides the tree: processor, libraries, inputs and the cases themselves."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    files = sorted(path for path in inputs.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    cases = hashlib.sha256(repr((COMMON, BASES, CASES)).encode()).hexdigest()
    return {"processor": processor, "inputs": digest, "cases": cases, **{name: version(name) for name in LIBRARIES}}


def checkout(tree: str, folder: Path, stack: ExitStack) -> Path:
    """The folder of a tree: itself, or a commit's worktree, which `stack` removes."""
    if Path(tree).is_dir():
        return Path(tree).resolve()
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), tree], check=True)
    stack.callback(subprocess.run, [*git, "remove", "--force", str(folder)], check=True)
    return folder


def enter(tree: Path, folder: Path, log: Path) -> None:
    """Give this process a tree's code, a working folder and a file for what it prints."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    # The first entry is this script's own folder.
    sys.path[:1] = [str(tree / name) for name in SOURCES]
    for name in ("dbtrain", "dbtrain_kernels", "dbtrain_launchers"):
        spec = find_spec(name)
        assert spec and Path(str(spec.origin)).is_relative_to(tree), f"{name} is not of {tree}: {spec}"


def run_rank(tree: Path, inputs: Path, log: Path, words: Sequence[str], launcher: dict[str, str]) -> None:
    """Run `dbtrain WORDS` of a tree in this process, as a rank if the launcher's variables are not empty."""
    enter(tree, inputs, log)
    os.environ.update(launcher)
    sys.argv = ["dbtrain", *words]
    run_module("dbtrain_launchers" if launcher else "dbtrain", run_name="__main__", alter_sys=True)


def dbtrain(tree: Path, inputs: Path, words: Sequence[object], ranks: int = 1) -> None:
    """Run `dbtrain WORDS` of a tree on some ranks, in the folder of the inputs; RuntimeError if it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    texts = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        log, common = Path(folder, "log"), {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        launchers = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        every = [(tree, inputs, log, texts, launcher if ranks > 1 else {}) for launcher in launchers]
        if not in_processes(run_rank, every):
            raise RuntimeError(f"dbtrain {shlex.join(texts)}\n{log.read_text()[-2000:]}")


def in_processes(work: Callable[..., None], every: Sequence[tuple]) -> bool:
    """Whether `work` ended well for all tuples of arguments, each in a process that has the libraries loaded."""
    processes = [WARM.Process(target=work, args=args) for args in every]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    try:
        # A rank that failed leaves the others waiting for it.
        while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in processes):
                break
            time.sleep(0.05)
        return all(process.exitcode == 0 for process in processes)
    finally:
        for process in processes:
            process.kill()


def outcome_of(tree: Path, inputs: Path, name: str) -> dict[str, object] | str:
    """What a tree computes in a case: {name of a number, tensor or file: value or digest}; a text is an error."""
    base, _, kind = name.partition("-")
    case = CASES[kind]
    subjects = list(SUBJECTS)[: case.subjects]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        done = out / "subjects" / subjects[0]
        words = ["train", "photos.csv", "--config", "tiny", "--out", out, "--quiet"]
        words += [word for subject in subjects for word in ("--subject", subject)]
        try:
            dbtrain(tree, inputs, [*words, *f"{COMMON} {BASES[base]} {case.settings}".split()], case.ranks)
            if case.use:
                dbtrain(tree, inputs, ["export", done, "--out", out / "kohya.safetensors"])
                dbtrain(tree, inputs, ["generate", done, "--prompt", "a photo of {subject}", "sample.steps=2"])
        except RuntimeError as error:
            return f"{tree}: {error}"
        return dict(sorted(pair for path in out.rglob("*") if path.is_file() for pair in parts(path, out)))


def parts(path: Path, out: Path) -> Iterator[tuple[str, object]]:
    """What is compared of a file: pairs of a name, which begins with the kind, and a number or digest."""
    place = path.relative_to(out).as_posix()
    if path.name == "log.jsonl":
        for row in map(json.loads, path.read_text().splitlines()):
            yield from ((f"number {place} step {row['step']} {key}", row[key]) for key in NUMBERS if key in row)
    elif path.suffix == ".safetensors":
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for tensor, about in json.loads(data[8:start]).items():
            if tensor != "__metadata__":
                begin, end = (start + offset for offset in about["data_offsets"])
                digest = hashlib.sha256(data[begin:end]).hexdigest()
                yield f"tensor {place} {tensor}", f"{about['dtype']} {about['shape']} {digest}"
    elif path.name.endswith(WHOLE_FILES):
        yield f"file {place}", hashlib.sha256(path.read_bytes()).hexdigest()


def verdict(name: str, outcomes: Sequence[dict[str, object] | str]) -> tuple[bool, list[str]]:
    """Whether a case is the same in all outcomes (a text is an error), and lines that say it; one is recorded."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if errors:
        return False, [f"{name}: failed", *errors]
    before, after = outcomes[0], outcomes[-1]
    pairs = [(key, before.get(key, "absent"), after.get(key, "absent")) for key in {**before, **after}]
    found = [f"  {key}: {old} / {new}" for key, old, new in pairs if old != new]
    if found:
        return False, [f"{name}: {len(found)} of {len(pairs)} differ", *found]
    kinds = [key.split()[0] for key in before]
    counts = ", ".join(f"{kinds.count(kind)} {kind}s" for kind in ("number", "tensor", "file"))
    return True, [f"{name}: {'same' if len(outcomes) > 1 else 'recorded'}: {counts}"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", metavar="TREE", help="a commit, or the folder of a checkout")
    parser.add_argument("--only", default=",".join(NAMES), help="names of cases, with commas between")
    parser.add_argument("--record", type=Path, help="write what TREE computes to this file")
    parser.add_argument("--against", type=Path, help="compare TREE with this file")
    parser.add_argument("--out", type=Path, help="write every line, without limit, to this file")
    parser.add_argument("--jobs", type=int, default=2, help="cases that run at once")
    args = parser.parse_args()
    if len(args.trees) + bool(args.record) + bool(args.against) != 2:
        parser.error("want two trees, or one tree with either --record or --against")
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(NAMES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; cases: {', '.join(NAMES)}")
    return args


def verdicts(args: argparse.Namespace, folder: Path, stack: ExitStack) -> Iterator[tuple[bool, list[str]]]:
    """Verdicts on the chosen cases, in order, as they are run; the file of `--record` is written after the last."""
    inputs = folder / "inputs"
    inputs.mkdir()
    if not in_processes(make_inputs, [(inputs, folder / "log")]):
        raise RuntimeError((folder / "log").read_text())
    about, kept = origin(inputs), {}
    if args.against:
        record = json.loads(args.against.read_text())
        kept = record["outcomes"]
        changed = [key for key in about if record["origin"].get(key) != about[key]]
        if changed or not kept.keys() >= set(args.only):
            print(f"{args.against}: made with other {', '.join(changed) or 'cases'}; make it anew", file=sys.stderr)
            sys.exit(2)
    trees = [checkout(tree, folder / f"tree-{number}", stack) for number, tree in enumerate(args.trees)]
    pool = ThreadPoolExecutor(args.jobs)
    stack.callback(pool.shutdown, cancel_futures=True)
    running = {name: [pool.submit(outcome_of, tree, inputs, name) for tree in trees] for name in args.only}
    outcomes = {}
    for name, futures in running.items():
        outcomes[name] = [future.result() for future in futures]
        yield verdict(name, [*([kept[name]] if args.against else []), *outcomes[name]])
    if args.record and not any(isinstance(outcome, str) for (outcome,) in outcomes.values()):
        record = {"origin": about, "outcomes": {name: outcome for name, (outcome,) in outcomes.items()}}
        args.record.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    args = arguments()
    os.environ.update(ENVIRONMENT)
    WARM.set_forkserver_preload(LOADED)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin, good, lines = time.monotonic(), True, []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-bits-")))
        for case_good, said in verdicts(args, folder, stack):
            good, lines = good and case_good, lines + said
            print("\n".join(said[: SHOWN + 1]), flush=True)
    print(f"{'no difference' if good else 'DIFFERENT'}, {time.monotonic() - begin:.0f} s")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
