"""What tuning the embedded upscaler on a subject buys: `python benchmarks/second_stage.py --out runs/second-stage`.

The paper's second stage is tuned on the subject, with less noise on the small picture than the base was trained with
(section 4.3). Here drawn subjects are rendered at 128 pixels: five photos to train on, and further layouts of the same
subject, in places that no photo shows, as the truth. Those are reduced to 64 pixels and enlarged by each arm's weights
in the stock pipeline, at the arm's level. Trainings and scores that are in --out are not made again. Writes
benchmarks/results/second-stage_cpu_<year and month>.{md,json}. What the demo's own second stage buys, and whether it is
the subject's: `--arms bicubic "adapters, as the demo trains them in a pack" "such adapters of another subject"`.
"""

import argparse
import json
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
from measures import mean_interval
from PIL import Image
from upscaler_quality import tile_distance, to_images

import dbtrain
from dbtrain.bench import commit
from dbtrain.evaluate.features import load_identity
from dbtrain.evaluate.intervals import shown
from dbtrain.models.load import quiet_libraries
from dbtrain.results.finished import own_pipeline
from dbtrain.settings.recipes import load
from dbtrain.storage.atomic import write_file
from dbtrain.tiny import UPSCALER
from dbtrain.training.step import TrainingStep
from dbtrain.verbs.demo import SECOND

sys.path.append(str(Path(__file__).resolve().parents[1] / "embedded"))

from dbtrain_embedded import demo, upscaler

RESULTS = Path(__file__).parent / "results"
USUAL = 13
"""The level whose variance is 1e-3: the paper's, before it lowers the noise."""
FAULT = "tuned with x_t as its own guide"
PACK = "adapters, as the demo trains them in a pack"
OTHER = "such adapters of another subject"
ARMS = {
    "bicubic": (None, 0),
    "not tuned, level 0": (None, 0),
    f"not tuned, level {USUAL}": (None, USUAL),
    "tuned at level 0": (0, 0),
    f"tuned at level {USUAL}": (USUAL, USUAL),
    FAULT: (0, 0),
    PACK: (0, 0),
    OTHER: (0, 0),
}
"""Name -> (level of training, or None for the base; level of drawing). `FAULT` is what diffusers' script trains."""
UNTUNED = "not tuned, level 0"
PLACES = ("jungle", "snow", "city", "mountain", "space", "sunset")
"""Places of the true pictures, none of which is in the photos; layouts 50 and on of the subject's hundred."""


def doubled(self, batch, step, noisy):
    """`TrainingStep.guided` with the noisy picture in the place of the small one, as diffusers' script has it."""
    return replace(batch, guide_BCHW=noisy, level_B=self.noised(batch, step).index_B)


def adapted(subject: str, subjects: list, out: Path) -> Path:
    """The folder of a subject, trained in one pack with all others as `dbtrain demo` trains its second stage."""
    recipe, *settings = SECOND.split()
    photos = demo.write(out / "photos" / "pack", tuple(subjects), upscaler.SIDE)
    done = dbtrain.train_manifest(photos, out / "pack", recipe, [*settings, "sample.images=0"], pack=len(subjects))
    if done.failed:
        raise SystemExit(f"{PACK}: {done.failed}")
    return out / "pack" / "subjects" / subject


def tuned(arm: str, subject: str, options: argparse.Namespace) -> Path:
    """The pipeline folder of a subject, trained with an arm's settings by dbtrain; or its folder with an adapter."""
    if arm in (PACK, OTHER):
        known = options.subjects
        return adapted(known[(known.index(subject) + (arm == OTHER)) % len(known)], known, options.out)
    settings = [f"train.steps={options.steps}", f"train.lr={options.lr}"]
    settings += [f"super.level={ARMS[arm][0]}", "sample.images=1", "sample.prompts=['a photo of {subject}']"]
    photos = demo.write(options.out / "photos" / subject, (subject,), upscaler.SIDE)
    with patch.object(TrainingStep, "guided", doubled) if arm == FAULT else nullcontext():
        done = dbtrain.train_manifest(photos, options.out / subject / arm.replace(" ", "-"), "tiny_upscaler", settings)
    if done.failed:
        raise SystemExit(f"{arm}: {done.failed}")
    return done.results[0].folder / "model"


def enlarged_by(arm: str, folder: Path, low: list, prompt: str) -> torch.Tensor:
    """Small PIL pictures, (N, 3, 128, 128) in [-1, 1], by the pipeline in a folder at the arm's level."""
    from diffusers import IFSuperResolutionPipeline

    guide = upscaler.to_tensor([upscaler.enlarged(picture) for picture in low])
    if arm == "bicubic":
        return guide
    whole = (folder / "model_index.json").exists()
    pipe = IFSuperResolutionPipeline.from_pretrained(folder, dtype=torch.float32) if whole else own_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    return upscaler.sample(pipe, guide, [prompt] * len(low), ARMS[arm][1])


def identity_distance(identity, one: Image.Image, other: Image.Image) -> float:
    """The mean of 1 - cosine of the identity encoder's features of nine places of two pictures of 128 pixels.

    The encoder sees 64 pixels, and a picture that is reduced to them shows no detail that the small one lacks. So it is
    shown crops of 64 pixels, 32 apart, at full size.
    """
    boxes = [(x, y, x + 64, y + 64) for x in (0, 32, 64) for y in (0, 32, 64)]
    mine, its = (identity.images([picture.crop(box) for box in boxes]) for picture in (one, other))
    return float(1 - (mine * its).sum(dim=1).mean())


def measure(arm: str, subject: str, options: argparse.Namespace, identity) -> dict:
    """{"PSNR", "patch distance", "identity distance"} of one subject: one value a picture, to its truth."""
    folder = UPSCALER if ARMS[arm][0] is None else tuned(arm, subject, options)
    truth = demo.pictures(subject, PLACES, upscaler.SIDE, first=50)
    low = [upscaler.reduced(picture) for picture in truth]
    made = enlarged_by(arm, folder, low, f"a photo of a {demo.SUBJECTS[subject][0]}")
    return {
        "PSNR": upscaler.psnr(made, upscaler.to_tensor(truth)).tolist(),
        "patch distance": [tile_distance(identity, a, b) for a, b in zip(to_images(made), truth, strict=True)],
        "identity distance": [identity_distance(identity, a, b) for a, b in zip(to_images(made), truth, strict=True)],
    }


def means(found: dict, measured: str) -> list:
    """The mean over its pictures, of each subject."""
    return [sum(values[measured]) / len(values[measured]) for values in found.values()]


def report(result: dict) -> str:
    """The results as Markdown."""
    less = f"less than {UNTUNED}"
    gains = {"PSNR": f"more than {UNTUNED}", "1,000 patch distance": less, "1,000 identity distance": less}
    names = ("way", "subjects", *(name for pair in gains.items() for name in pair))
    about = "; ".join(f"{key} {value}" for key, value in result["about"].items())
    lines = [
        "# The embedded upscaler, tuned on a subject",
        "",
        f"{about}.",
        f"Each subject has five photos of 128 pixels to train on, and {len(PLACES)} pictures in other places, reduced",
        "to 64 pixels and enlarged again. Mean over subjects [95 % interval over subjects]; PSNR in dB and patch",
        "distance, quarter by quarter, to the true picture: LPIPS's form, over the layers of the identity encoder.",
        "Identity distance: 1 - the cosine of the same encoder's features, nine crops of 64 pixels at full size.",
        "Differences are of the same subjects.",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for arm, found in result["arms"].items():
        cells = [str(len(found))]
        for measured, sign, scale in (("PSNR", 1, 1), ("patch distance", -1, 1000), ("identity distance", -1, 1000)):
            same = {subject: result["arms"][UNTUNED][subject] for subject in found}
            own, base = ([scale * value for value in means(each, measured)] for each in (found, same))
            gained = [sign * (a - b) for a, b in zip(own, base, strict=True)]
            cells += [shown(mean_interval(own).row()), "" if arm == UNTUNED else shown(mean_interval(gained).row())]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what is missing, subject by subject, and write the two files after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="trainings and scores, kept; one folder for one setup")
    parser.add_argument("--subjects", nargs="+", default=["dog-tan", "robot-white", "backpack-red"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--name", default="second-stage", help="what the result files are called")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the files are written")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    options.out = options.out.resolve()
    about = {"machine": f"{platform.machine()}, 1 thread", "torch": torch.__version__, "commit": commit(),
             "diffusers": diffusers.__version__, "steps": options.steps, "batch": load("tiny_upscaler").train.batch,
             "lr": options.lr}  # fmt: skip
    if PACK in options.arms:
        about["adapters"] = SECOND
    identity, arms = load_identity(), {}
    for arm in sorted({UNTUNED, *options.arms}, key=[UNTUNED, *ARMS].index):
        arms[arm] = {}
        for subject in options.subjects:
            kept = options.out / subject / f"{arm.replace(' ', '-')}.json"
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_file(kept, json.dumps(measure(arm, subject, options, identity)).encode())
            arms[arm][subject] = json.loads(kept.read_text(encoding="utf-8"))
            print(arm, subject, means({subject: arms[arm][subject]}, "PSNR"), flush=True)
            result = {"about": about, "arms": arms}
            target = options.results / f"{options.name}_cpu_{time.strftime('%Y%m')}"
            target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            target.with_suffix(".md").write_text(report(result), encoding="utf-8")


if __name__ == "__main__":
    main()
