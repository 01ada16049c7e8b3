"""What masks and captions of each photo do on the embedded base: `python benchmarks/masks_and_captions.py`.

Two questions, each with the drawn subjects of the demo, one pack an arm, with the same settings, seeds and noise:
(a) All photos of a subject have one and the same background. Trained without masks, and with the true mask: how often
does a prompt of another scene show it, how often that background instead, and what does the mask cost in identity?
(b) Photos in five scenes, trained with one caption, and with each photo's true one. The same scores.
Prompts name scenes that no photo shows. Identity is the cosine with five pictures in other scenes than those of (a).
Scenes are recognized zero-shot, the class being given. Intervals are over subjects, differences in pairs.
Writes <name>_<device>_<year and month>.{md,json}; running again goes on where it was stopped.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measures import choose, mean_interval
from PIL import Image, ImageOps

from dbtrain.bench import commit
from dbtrain.evaluate.intervals import shown
from dbtrain.evaluate.judge import Judge, load_judge
from dbtrain.evaluate.scores import cosines
from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.models.sampling import generate, image_seed
from dbtrain.results.finished import finished_pipeline
from dbtrain.settings.recipes import load
from dbtrain.train import train_manifest

sys.path.append(str(Path(__file__).resolve().parents[1] / "embedded"))

from dbtrain_embedded import demo, sprites, world
from dbtrain_embedded.scenery import SCENES, paint
from dbtrain_embedded.world import PLACES, article

RESULTS = Path(__file__).parent / "results"
PHOTOS = 5
PLAIN = 2
"""Pictures of the prompt without a scene."""


@dataclass(frozen=True)
class Arm:
    """One way to train: which photos, with masks or not, with their own captions or not."""

    photos: str
    settings: tuple[str, ...] = ()
    own_captions: bool = False


ARMS = {
    "one background": Arm("one background", ("data.mask=false",)),
    "one background, masked": Arm("one background"),
    "one caption": Arm("five scenes"),
    "own captions": Arm("five scenes", own_captions=True),
}
PAIRS = [
    ("one background, masked", "one background"),
    ("own captions", "one caption"),
]
"""Arms whose difference is shown, first minus second."""
SCORES = {
    "scene": "scene accuracy",
    "leak": "a training scene instead",
    "identity": "identity, placed",
    "plain": "identity, plain prompt",
}


def background_of(subject: str) -> str:
    """The place of all photos of a subject in question (a)."""
    return PLACES[(4 * list(demo.SUBJECTS).index(subject)) % len(PLACES)]


def one_background(subject: str) -> list[tuple[Image.Image, Image.Image]]:
    """(photo, mask) of a subject before the very same background: size, direction and position differ."""
    noun, vendor, name = demo.SUBJECTS[subject]
    figure = sprites.load("heldout")[1][demo.find(noun, vendor, name)]
    seed, made = 90_000 + 100 * list(demo.SUBJECTS).index(subject), []
    for number in range(PHOTOS):
        rng = world.stream(seed + number, 3)
        canvas = paint(background_of(subject), world.stream(seed))
        scale = rng.uniform(0.62, 0.84) * world.SIDE / max(figure.size)
        small = figure.resize([max(1, round(side * scale)) for side in figure.size], Image.Resampling.BICUBIC)
        small = ImageOps.mirror(small) if rng.random() < 0.5 else small
        middle = [world.SIDE * (share + rng.uniform(-0.06, 0.06)) for share in (0.5, 0.56)]
        corner = tuple(round(at - side / 2) for at, side in zip(middle, small.size, strict=True))
        layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
        layer.paste(small, corner)
        canvas.paste(layer, (0, 0), layer)
        made.append((canvas, layer.getchannel("A")))
    return made


def write_photos(folder: Path, arm: Arm, count: int) -> Path:
    """The manifest of an arm for the first `count` subjects, beside its photos."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for subject, (noun, _, _) in list(demo.SUBJECTS.items())[:count]:
        files = [folder / subject / f"{number}.png" for number in range(PHOTOS)]
        files[0].parent.mkdir(exist_ok=True)
        row = {"subject": subject, "class": noun, "images": [str(file.relative_to(folder)) for file in files]}
        if arm.photos == "one background":
            for file, (photo, mask) in zip(files, one_background(subject), strict=True):
                photo.save(file)
                mask.save(file.with_name(f"{file.stem}-mask.png"))
        else:
            for file, photo in zip(files, demo.pictures(subject), strict=True):
                photo.save(file)
        if arm.own_captions:
            row["captions"] = [f"a photo of {{subject}} {SCENES[place][1][0]}".strip() for place in demo.SCENES]
        rows.append(json.dumps(row))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return manifest


def scenes_of(subject: str, arm: Arm) -> tuple[str, ...]:
    """The scenes of a subject's photos."""
    return (background_of(subject),) if arm.photos == "one background" else demo.SCENES


def scores(judge: Judge, subject: str, arm: Arm, pictures: Sequence[Image.Image]) -> dict[str, float]:
    """The scores of a subject from its plain pictures and then one of each other scene."""
    noun, trained = demo.SUBJECTS[subject][0], scenes_of(subject, arm)
    asked, names = [place for place in PLACES if place not in trained], list(SCENES)
    plain, placed = pictures[:PLAIN], pictures[PLAIN:]
    texts = [f"a photo of {article(noun)} {SCENES[name][1][0]}".strip() for name in names]
    seen = [names[number] for number in choose(judge.pair, placed, [texts] * len(placed)).tolist()]
    # References stand in scenes that question (a) does not train: a background that leaks must not count as identity.
    other = tuple(place for place in demo.SCENES if place not in trained)
    real = judge.identity.images(demo.pictures(subject, other or demo.SCENES))
    likeness = {"identity": placed, "plain": plain}
    found = {key: float(cosines(judge.identity.images(group), real).mean()) for key, group in likeness.items()}
    found["scene"] = float(np.mean([one == want for one, want in zip(seen, asked, strict=True)]))
    return found | {"leak": float(np.mean([one in trained for one in seen]))}


def measure(options: argparse.Namespace, name: str, judge: Judge) -> dict[str, dict[str, float]]:
    """subject -> scores of an arm, trained and drawn now or before."""
    arm, folder = ARMS[name], options.out / name.replace(", ", "-").replace(" ", "-")
    kept = folder / "scores.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))
    shared = [f"prior.store={options.out / 'priors'}", "sample.images=0", "track.tensorboard=false"]
    settings = [*shared, f"train.steps={options.steps}", f"engine.packed.size={options.subjects}", *arm.settings]
    config = load("tiny_packed", settings)
    manifest = write_photos(folder / "photos", arm, options.subjects)
    records, failed = train_manifest(manifest, config, folder, None)
    if failed:
        raise SystemExit(f"{name}: {failed}")
    base = load_models(FAMILIES["sd"], config.model)
    found = {}
    for record in records:
        subject, named = record["subject"], f"{record['identifier']} {record['class']}"
        places = ["plain"] * PLAIN + [place for place in PLACES if place not in scenes_of(subject, arm)]
        prompts = [f"a photo of {named} {SCENES[place][1][0]}".strip() for place in places]
        seeds = [image_seed("masks and captions", subject, place, number) for number, place in enumerate(places)]
        with finished_pipeline(folder / "subjects" / subject, FAMILIES["sd"], base, config) as pipeline:
            sample = config.sample
            drawn = list(generate(pipeline, prompts, seeds, world.SIDE, sample.steps, sample.guidance, batch=16))
        (folder / "pictures" / subject).mkdir(parents=True, exist_ok=True)
        for number, (place, picture) in enumerate(zip(places, drawn, strict=True)):
            picture.save(folder / "pictures" / subject / f"{number:02d}-{place.replace(' ', '-')}.png")
        found[subject] = scores(judge, subject, arm, drawn)
        print(f"   {name}: {subject}: {found[subject]}", flush=True)
    kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def rows_of(measured: dict[str, dict[str, dict[str, float]]]) -> list[dict]:
    """A row for each arm and each difference: its name and the interval of every score."""
    rows = []
    for name, found in measured.items():
        rows.append({"row": name} | {key: interval([one[key] for one in found.values()]) for key in SCORES})
    for first, second in [pair for pair in PAIRS if set(pair) <= measured.keys()]:
        one, other = measured[first], measured[second]
        apart = {key: interval([one[name][key] - other[name][key] for name in one]) for key in SCORES}
        rows.append({"row": f"{first}, minus {second}"} | apart)
    return rows


def interval(values: Sequence[float]) -> dict:
    """The mean over subjects with its 95 % interval."""
    return mean_interval(values).row("subjects")


def main() -> None:
    """Train, draw, score, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=len(demo.SUBJECTS), help="only the first N demo subjects")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each subject")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these arms")
    parser.add_argument("--out", type=Path, default=Path("runs/masks-and-captions"), help="working folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    judge = load_judge(device="cpu")
    measured = {name: measure(options, name, judge) for name in options.arms}
    words = ["--subjects", str(options.subjects), "--steps", str(options.steps)]
    only = options.arms if options.arms != list(ARMS) else []
    about = {
        "machine": f"{platform.machine()} with {os.cpu_count()} CPUs, cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "command": shlex.join(
            ["python", "benchmarks/masks_and_captions.py", *words, *(["--arms", *only] if only else [])]
        ),
        "recipe": f"tiny_packed, {options.steps} steps, seed 0",
        "subjects": options.subjects,
    }
    rows = rows_of(measured)
    lines = [
        "# Masks and captions of each photo on the embedded base",
        "",
        "; ".join(f"{k} {v}" for k, v in about.items()),
    ]
    lines += ["", "| | " + " | ".join(SCORES.values()) + " |", "|---" * (len(SCORES) + 1) + "|"]
    lines += [f"| {row['row']} | " + " | ".join(shown(row[key]) for key in SCORES) + " |" for row in rows]
    place = options.results / f"masks-and-captions_cpu_{time.strftime('%Y%m')}"
    place.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = {"about": about, "rows": rows, "subjects": measured}
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
