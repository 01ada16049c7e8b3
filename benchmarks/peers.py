"""Start-up and step time beside diffusers' DreamBooth scripts: same base, photos, priors, batch, steps and precision.

    python benchmarks/peers.py --script lora=PATH/train_dreambooth_lora.py --script full=PATH/train_dreambooth.py

Each program runs at two lengths; processor time is a line in the number of steps, so the slope is a step and the
intercept is start-up, loading, caching and saving. Runs alternate (ours, theirs, ours, ...), on one thread, and
processor time of the whole process tree is what is compared: it hardly moves with the load of the machine.
The scripts import torchvision; beside a CPU torch give its unpacked wheel with --peer-path.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dbtrain.bench import commit  # noqa: E402
from dbtrain.subjects.manifest import read_manifest  # noqa: E402
from dbtrain.tiny import BASE, DEMO  # noqa: E402

RECIPES = {"lora": ("tiny", 1e-3), "full": ("tiny_full", 1e-4)}
BATCH, RANK, PRIORS, RESOLUTION = 4, 16, 40, 64


def timed(command: list[str], extra_path: list[str]) -> tuple[float, float]:
    """(wall, processor) seconds of a command and all its children, on one thread; exits loudly if it fails."""
    paths = [*extra_path, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"failed ({done.returncode}): {' '.join(command)}\n{done.stderr[-3000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(method: str, steps: int, work: Path, subject: str) -> list[str]:
    """Our command line."""
    recipe, lr = RECIPES[method]
    out = work / "ours"
    shutil.rmtree(out, ignore_errors=True)
    return [sys.executable, "-m", "dbtrain", "train", str(DEMO), "--subject", subject, "--config", recipe,
            "--out", str(out), f"train.steps={steps}", f"train.batch={BATCH}", f"train.lr={lr}", f"lora.rank={RANK}",
            "train.schedule=constant", "objective.timesteps=uniform",
            "lora.targets=[attn*.to_q, attn*.to_k, attn*.to_v, attn*.to_out.0]", f"prior.images={PRIORS}",
            f"prior.store={work / 'priors'}", "sample.images=0", "track.tensorboard=false", "train.ema=null",
            "publish.dtype=fp32"]


def theirs(method: str, script: str, steps: int, work: Path, photos: Path, class_noun: str) -> list[str]:
    """The peer's command line."""
    out = work / "theirs"
    shutil.rmtree(out, ignore_errors=True)
    return [sys.executable, script, "--pretrained_model_name_or_path", str(BASE), "--instance_data_dir", str(photos),
            "--instance_prompt", f"a photo of sks {class_noun}", "--class_data_dir", str(work / "class"),
            "--class_prompt", f"a photo of a {class_noun}", "--with_prior_preservation",
            "--num_class_images", str(PRIORS), "--resolution", str(RESOLUTION), "--center_crop",
            "--train_batch_size", str(BATCH), "--max_train_steps", str(steps),
            "--learning_rate", str(RECIPES[method][1]), "--lr_warmup_steps", "0", "--lr_scheduler", "constant",
            "--seed", "0", "--checkpointing_steps", "100000", "--dataloader_num_workers", "0",
            "--output_dir", str(out), "--mixed_precision", "no",
            *(["--rank", str(RANK)] if method == "lora" else [])]


def share_priors(work: Path, subject: str) -> None:
    """Make the class images once with dbtrain, and lay the same files out as the peers want them."""
    timed([*ours("lora", 1, work, subject)], [])
    folder = work / "class"
    folder.mkdir(exist_ok=True)
    from dbtrain.data.index import Index
    from dbtrain.data.stream import read_samples

    for block in sorted((work / "priors").glob("*/block-*")):
        for sample in read_samples(block, Index.load(block).entries):
            (folder / f"{sample.key}.png").write_bytes(sample.image)


def compare(method: str, script: str, arguments: argparse.Namespace, work: Path) -> dict:
    """Medians of processor seconds a step and of start-up, ours and theirs, and their ratios."""
    subject = read_manifest(DEMO)[0]
    short, long = arguments.steps
    rows: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(arguments.runs):
        for steps in (short, long):
            rows.setdefault(("ours", steps), []).append(timed(ours(method, steps, work, subject.id), []))
            command = theirs(method, script, steps, work, subject.images[0].parent, subject.class_noun)
            rows.setdefault(("theirs", steps), []).append(timed(command, arguments.peer_path))
            walls = (f"{who} {rows[who, steps][-1][1]:.1f} s" for who in ("ours", "theirs"))
            print(method, turn, steps, *walls, flush=True)
    result: dict = {"script": Path(script).name, "runs": {f"{who} {steps}": rows[who, steps] for who, steps in rows}}
    for who in ("ours", "theirs"):
        low, high = (statistics.median(cpu for _, cpu in rows[who, steps]) for steps in (short, long))
        step = (high - low) / (long - short)
        result[who] = {"step_cpu_s": step, "start_cpu_s": low - short * step,
                       "wall_s": statistics.median(wall for wall, _ in rows[who, long])}
    result["ratio"] = {key: result["theirs"][key] / result["ours"][key] for key in result["ours"]}
    return result


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", action="append", required=True, metavar="lora|full=PATH")
    parser.add_argument("--peer-path", action="append", default=[], help="folder for the peers' PYTHONPATH")
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 110))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("bench-peers"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "peers_cpu_202611")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    share_priors(work, read_manifest(DEMO)[0].id)
    results = {method: compare(method, script, arguments, work)
               for method, script in (entry.split("=", 1) for entry in arguments.script)}
    import diffusers
    import torch

    about = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread used",
             "torch": torch.__version__, "diffusers": diffusers.__version__, "commit": commit(),
             "steps": arguments.steps, "runs": arguments.runs,
             "batch": f"{BATCH} instance + {BATCH} prior at {RESOLUTION} px"}
    arguments.out.with_suffix(".json").write_text(json.dumps({"about": about, **results}, indent=1))
    arguments.out.with_suffix(".md").write_text(markdown(about, results))
    print(markdown(about, results))


def markdown(about: dict, results: dict) -> str:
    """The comparison as a table."""
    lines = ["# Beside diffusers' DreamBooth scripts", "",
             "Processor seconds (median of the runs, interleaved, one thread); ratio = theirs / ours.", "",
             "| script | figure | ours | theirs | ratio |", "|---|---|---|---|---|"]
    names = {"step_cpu_s": "one step", "start_cpu_s": "start-up, load, cache, save", "wall_s": "whole long run, wall"}
    for result in results.values():
        for key, name in names.items():
            lines.append(f"| {result['script']} | {name} | {result['ours'][key]:.3f} | {result['theirs'][key]:.3f} "
                         f"| {result['ratio'][key]:.2f} |")
    return "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in about.items()), "",
                      "Made by `python benchmarks/peers.py --script lora=... --script full=...`.", ""])


if __name__ == "__main__":
    main()
