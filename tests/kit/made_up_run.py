"""Made-up runs of any size for the report: the files of a run as `dbtrain train` and `evaluate` leave them."""

import io
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from dbtrain.settings.recipes import loads, render

CLASSES = ("dog", "cat", "teapot", "backpack", "robot", "car", "vase", "sneaker", "toy", "candle", "clock", "bowl")
PROMPTS = ("a photo of {subject}", "a photo of {subject} in the jungle", "a photo of {subject} on the beach")
START = 1_795_000_000


def picture(seed: int, side: int = 64) -> bytes:
    """A PNG of a simple scene: sky, ground, and a shape whose colours the seed decides."""
    dice = random.Random(seed)
    colour = lambda low, high: tuple(dice.randint(low, high) for _ in range(3))  # noqa: E731
    image = Image.new("RGB", (side, side), colour(120, 240))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, side * 2 // 3, side, side), fill=colour(60, 200))
    x, y, r = dice.uniform(0.3, 0.7) * side, dice.uniform(0.4, 0.6) * side, dice.uniform(0.15, 0.3) * side
    shape = dice.choice([pen.ellipse, pen.rectangle, lambda box, fill: pen.rounded_rectangle(box, r / 3, fill=fill)])
    shape((x - r, y - r, x + r, y + r), fill=colour(20, 255))
    pen.ellipse((x - r / 2, y - r / 2, x, y), fill=colour(20, 255))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def record(subject: str, number: int, dice: random.Random, **other) -> dict:
    """A finished subject's record.json."""
    noun = CLASSES[number % len(CLASSES)]
    train = dice.lognormvariate(3.2, 0.35)
    return {
        "subject": subject, "class": noun, "identifier": f"q{chr(97 + number % 26)}v", "run": f"{number:064x}",
        "caption": f"a photo of q{chr(97 + number % 26)}v {noun}", "base": "embedded", "family": "sd",
        "base_digest": "b" * 64, "data_digest": "d" * 64, "method": "lora", "steps": 400, "seed": 0, "lr": 1e-3,
        "loss": round(dice.uniform(0.25, 0.8), 5), "world_size": 1, "zero_stage": 0, "peak_memory_gib": 0.62,
        "dbtrain": "0.1.0", "torch": "2.13.0", "finished": iso(START + number * 7 + dice.uniform(0, 60)),
        "stages_s": {"data": 0.004, "prior": 0.4, "encode": 0.06, "build": 0.09, "train": round(train, 3),
                     "sample": round(train * 0.4, 3), "save": 0.03},
        **other,
    }  # fmt: skip


def iso(seconds: float) -> str:
    """A moment as records write it."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def log(steps: int, dice: random.Random, last: float) -> str:
    """log.jsonl of a training that converges."""
    lines = []
    for step in range(10, steps + 1, 10):
        loss = last + 0.5 * math.exp(-step / 80) + dice.gauss(0, 0.02)
        lines.append(
            {
                "step": step,
                "loss": loss,
                "loss_instance": loss * 0.6,
                "loss_prior": loss * 0.4,
                "lr": 1e-3,
                "grad_norm": 0.2,
                "images_per_s": 68.0,
                "steps_per_s": 8.5,
                "data_wait_share": 0.01,
            }
        )
    return "".join(json.dumps(line) + "\n" for line in lines)


def evaluation(made: dict, dice: random.Random, images: list[dict]) -> dict:
    """evaluation.json of the subject that a record is of."""

    def scores(shift: float) -> dict:
        middle = {"dino": 0.62, "clip_i": 0.78, "clip_t": 0.29, "clip_t_plain": 0.3, "pres": 0.42, "div": 0.35}
        values = {key: value + shift * (value < 0.9) + dice.gauss(0, 0.06) for key, value in middle.items()}
        return {key: {"value": at, "low": at - 0.03, "high": at + 0.03, "count": 4} for key, at in values.items()}

    own = scores(0)
    sampling = {"steps": 25, "guidance": 3.0, "resolution": 64, "seed": 0}
    low = [{"kind": "overfit", "text": "samples hardly differ between prompts"}] if own["div"]["value"] < 0.25 else []
    return {
        "schema": 1,
        **{key: made[key] for key in ("subject", "class", "identifier", "run")},
        "base_model": made["base"],
        "photos": 4,
        "protocol": {"name": "quick", "superclass": "live", "prompts": 2, "images": 1, "class_images": 4, **sampling},
        "encoders": {"identity": "embedded", "clip": "embedded", "distance": "patch"},
        "scores": own,
        "base": scores(-0.2),
        "real": scores(0.2),
        "warnings": low,
        "images": images,
    }


def make_subject(
    folder: Path,
    number: int,
    sheets: tuple[str, ...],
    recipe: str,
    pool: list[bytes],
    seeds: int = 2,
    judged: bool = True,
    **other,
) -> None:
    """One finished subject's folder; pictures are drawn from a pool."""
    dice = random.Random(number)
    folder.mkdir(parents=True)
    made = record(folder.name, number, dice, **other)
    (folder / "record.json").write_text(json.dumps(made))
    (folder / "config.yaml").write_text(recipe)
    (folder / "log.jsonl").write_text(log(made["steps"], dice, made["loss"]))
    for sheet in sheets:
        (folder / "samples" / sheet).mkdir(parents=True)
        for prompt in range(len(PROMPTS)):
            for seed in range(seeds):
                path = folder / "samples" / sheet / f"prompt-{prompt:02d}-image-{seed:02d}.png"
                path.write_bytes(dice.choice(pool))
    if judged:
        images = []
        (folder / "evaluation").mkdir()
        for i, prompt in enumerate(PROMPTS[1:]):
            for row in ("tuned", "base"):
                name = f"evaluation/{row}-{i}.png"
                (folder / name).write_bytes(dice.choice(pool))
                images.append(
                    {"file": name, "prompt": prompt.replace("{subject}", made["class"]), "seed": 0, "row": row}
                )
        (folder / "evaluation.json").write_text(json.dumps(evaluation(made, dice, images)))


def make_run(
    run: Path,
    count: int,
    sheets: tuple[str, ...] = ("samples",),
    side: int = 64,
    judged: bool = True,
    pool: int = 200,
    steps: int = 400,
    photos: int = 0,
) -> Path:
    """A run of `count` finished subjects, with the table over them if they are judged; with `photos`, shards of so many
    photos for each subject too."""
    prompts = json.dumps(list(PROMPTS))
    recipe = render(loads(f"train: {{steps: {steps}}}\nsample: {{prompts: {prompts}}}"))
    images = [picture(seed, side) for seed in range(pool)]
    for number in range(count):
        make_subject(
            run / "subjects" / f"{CLASSES[number % len(CLASSES)]}-{number:05d}",
            number,
            sheets,
            recipe,
            images,
            judged=judged,
        )
    if judged and count:
        from dbtrain.evaluate.summary import write_summary

        write_summary(run)
    if photos:
        make_shards(run, count, photos, images)
    return run


def make_shards(run: Path, count: int, photos: int, images: list[bytes]) -> None:
    """The photos of a made-up run through dbtrain's own shard writer."""
    from dbtrain.subjects.manifest import scan_manifest
    from dbtrain.subjects.sharding import shard_subjects

    folder = run / "photos"
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / f"{i}.png").write_bytes(image)
    lines = [
        json.dumps(
            {
                "subject": f"{CLASSES[n % len(CLASSES)]}-{n:05d}",
                "class": CLASSES[n % len(CLASSES)],
                "images": [f"photos/{(n * photos + i) % len(images)}.png" for i in range(photos)],
            }
        )
        for n in range(count)
    ]
    (run / "photos.jsonl").write_text("\n".join(lines) + "\n")
    subjects, findings = scan_manifest(run / "photos.jsonl")
    shard_subjects(subjects, findings, run / "shards", loads("data: {resolution: 64}"), lambda line: None)
