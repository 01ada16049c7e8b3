"""Blind judging of the embedded base and of the demo: what does a picture show, and whom?

    python benchmarks/blind.py sheet OUT             # 64 pictures of the contact sheet's prompts, in random order
    python benchmarks/blind.py subjects OUT --run RUN    # the demo's samples, each beside drawings of its class
    python benchmarks/blind.py score OUT ANSWERS.json [--part NAME] # NAME: a part of the file of results

The pages in OUT carry numbers and no words. A judge, who has seen neither prompts nor the key, answers in a JSON
object. For `sheet`: number -> [what is shown, where it is], in free words. For `subjects`: number -> the letter of the
drawing that the sample shows. `OUT/key.json` has the truth; the judge must not see it.
A picture counts as recognized if the answer holds its class noun or one of `ALSO`; scenes are counted in the same way.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).resolve().parents[1] / "embedded"))

from tiny_quality import RESULTS, SHEET, commit, generate
from upscaler_quality import to_images

from dbtrain.subjects.manifest import read_manifest
from dbtrain.tiny import BASE, DEMO_LARGE
from dbtrain_embedded import sprites, world
from dbtrain_embedded.autoencoder import encode
from dbtrain_embedded.demo import SUBJECTS
from dbtrain_embedded.scenery import SCENES

ALSO = {
    "dog": ("puppy", "pug", "poodle", "hound"), "cat": ("kitten", "kitty"), "rabbit": ("bunny", "hare"),
    "turtle": ("tortoise",), "frog": ("toad",), "airplane": ("plane", "jet", "aircraft"),
    "car": ("automobile", "taxi", "vehicle", "sedan"), "bus": ("coach",), "rocket": ("spaceship", "spacecraft"),
    "teapot": ("kettle", "tea pot"), "backpack": ("rucksack", "schoolbag", "school bag", "knapsack"),
    "sneaker": ("shoe", "trainer"), "doughnut": ("donut",), "fox": (), "clock": ("alarm", "watch"),
    "jungle": ("forest", "foliage", "trees", "leaves", "bush"), "snow": ("snowy", "winter"), "beach": ("sand", "sea"),
    "cobblestone": ("cobble", "stone", "pavement", "brick", "paving"), "grass": ("lawn", "meadow", "field"),
    "fabric": ("cloth", "curtain", "drape", "silk", "satin"), "floor": ("wood", "plank"), "city": ("town", "buildings"),
    "mountain": ("hill", "peak"), "water": ("sea", "ocean", "lake", "pond"), "desert": ("sand", "dune"),
    "space": ("stars", "night sky"), "rug": ("carpet", "mat"), "night": ("moon", "stars", "dark"),
    "sunset": ("dusk", "sunrise", "stripes"),
}  # fmt: skip
"""What else a judge may call a class or a scene."""
TRUE = ("scenes", "scenes-vae")
"""In place of a base: true scenes of the prompts, and what the shipped VAE makes of them. No base can show more."""
SCENE_WORDS = ("jungle", "snow", "beach", "cobblestone", "grass", "fabric", "floor", "city", "mountain", "water",
               "desert", "space", "rug", "night", "sunset")  # fmt: skip


def told(answer: str, truth: str) -> bool:
    """Whether the words of an answer hold the truth or one of its other names."""
    return any(word in answer.lower() for word in (truth, *ALSO.get(truth, ())))


def page(cells: list, first: int, columns: int, out: Path) -> None:
    """A page of pictures of one height, numbered from `first` in their upper left corners."""
    wide, high = max(cell.width for cell in cells) + 6, cells[0].height + 22
    sheet = Image.new("RGB", (columns * wide, -(-len(cells) // columns) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for index, cell in enumerate(cells):
        left, top = index % columns * wide, index // columns * high
        pen.text((left + 4, top + 2), str(first + index), fill="black", font_size=16)
        sheet.paste(cell, (left + 3, top + 20))
    sheet.save(out)


def noun_of(prompt: str) -> str:
    """The class noun in a prompt."""
    return next(noun for noun in sprites.CLASSES if noun in prompt.split())


def facts_of(prompt: str, rng) -> world.Facts:
    """What a scene of the world shows that fits the prompt; `rng` picks one of the class's drawings."""
    noun = noun_of(prompt)
    places = {phrases[0]: place for place, (_, phrases) in SCENES.items() if place != "plain"}
    return world.Facts(
        noun,
        int(rng.choice(sprites.of_noun(noun, "train"))),
        next((place for phrase, place in places.items() if phrase in prompt), "plain"),
        colour=next((colour for colour in world.COLOURS if f" {colour} {noun}" in prompt), None),
        accessory=next((one for one in world.ACCESSORIES if "wearing" in prompt and one in prompt.split()), None),
        style=next((style for style in world.STYLES if style in prompt), None),
        view="close" if "close-up" in prompt else None,
    )


def true_pictures(prompts: list, noise: int) -> list:
    """A true scene of each prompt, 64 x 64."""
    rngs = [world.stream(1_000_000 * noise + index, 9) for index in range(len(prompts))]
    return [world.render(facts_of(prompt, rng), rng) for prompt, rng in zip(prompts, rngs, strict=True)]


@torch.no_grad()
def given_back(vae, pictures: list) -> list:
    """The pictures as the VAE decodes what it has encoded."""
    return to_images(vae.decode(encode(vae, np.stack([np.asarray(one) for one in pictures]))).sample)


def draw_sheet(out: Path, base: str, seed: int, noise: int) -> list:
    """Pages of the 64 pictures; the key: one {prompt, class, scene} a picture.

    base: its folder, or one of TRUE.
    """
    from diffusers import StableDiffusionPipeline

    prompts = [p for line in SHEET.splitlines() for p in line.split("|")]
    pipe = StableDiffusionPipeline.from_pretrained(BASE if base in TRUE else base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if base in TRUE:
        pictures = true_pictures(prompts, noise)
        pictures = given_back(pipe.vae, pictures) if base == "scenes-vae" else pictures
    else:
        pictures = [Image.fromarray(picture) for picture in generate(pipe, prompts, noise, 25)]
    order = np.random.default_rng(seed).permutation(len(prompts))
    cells = [pictures[i].resize((224, 224), Image.BICUBIC) for i in order]
    for start in range(0, len(cells), 16):
        page(cells[start : start + 16], start + 1, 4, out / f"page-{start // 16 + 1}.png")
    scenes = {i: next((s for s in SCENE_WORDS if s in prompts[i].split()), None) for i in order}
    return [{"prompt": prompts[i], "class": noun_of(prompts[i]), "scene": scenes[i]} for i in order]


def drawings(subject: str, first: Path, rng, count: int = 4) -> list:
    """(pictures, place of the subject): a photo of the subject among plain pictures of other drawings of its class."""
    photo = Image.open(first).convert("RGB").resize((128, 128), Image.BICUBIC)
    noun, _, own = SUBJECTS[subject]
    others = []
    for split in ("heldout", "train"):
        for index in sprites.of_noun(noun, split):
            # The subject's own drawing is in the held-out art twice: flat, and shaded.
            if split == "heldout" and sprites.load(split)[0][index].name == own:
                continue
            facts = world.Facts(noun, index, "plain")
            others.append(np.asarray(world.render(facts, world.stream(index, 3), split, 128), np.float32))
    # Those that differ most from what is chosen, one after the other.
    chosen = [np.asarray(photo, np.float32)]
    while len(chosen) < min(count, 1 + len(others)):
        far = [min(np.abs(o - c).mean() for c in chosen) for o in others]
        chosen.append(others.pop(int(np.argmax(far))))
    order = rng.permutation(len(chosen))
    return [Image.fromarray(chosen[i].astype(np.uint8)) for i in order], int(np.flatnonzero(order == 0)[0])


def draw_subjects(out: Path, run: Path, seed: int) -> list:
    """Pages of samples, each beside lettered drawings of its class; the key: one {subject, letter} a sample."""
    rng, cells, key = np.random.default_rng(seed), [], []
    for subject in read_manifest(DEMO_LARGE):
        samples = sorted((run / "subjects" / subject.id / "samples" / "samples").glob("*.png"))
        for path in samples:
            options, place = drawings(subject.id, Path(subject.images[0]), rng)
            row = Image.new("RGB", (160 + 132 * len(options), 150), "white")
            row.paste(Image.open(path).convert("RGB").resize((128, 128), Image.BICUBIC), (0, 18))
            for index, option in enumerate(options):
                ImageDraw.Draw(row).text((160 + 132 * index, 0), "ABCDEFGH"[index], fill="black", font_size=16)
                row.paste(option, (160 + 132 * index, 18))
            cells.append(row)
            key.append({"subject": subject.id, "letter": "ABCDEFGH"[place], "sample": path.name})
    order = rng.permutation(len(cells))
    for start in range(0, len(cells), 8):
        page([cells[i] for i in order[start : start + 8]], start + 1, 2, out / f"page-{start // 8 + 1:02}.png")
    return [key[i] for i in order]


def score(key: list, answers: dict) -> dict:
    """How many were recognized, and what was missed."""
    given = [answers.get(str(number), "") for number in range(1, len(key) + 1)]
    if "letter" in key[0]:
        hits = [str(answer).strip().upper() == row["letter"] for row, answer in zip(key, given, strict=True)]
        by = {s: [hit for row, hit in zip(key, hits, strict=True) if row["subject"] == s] for s in
              sorted({row["subject"] for row in key})}  # fmt: skip
        return {"picked out": share(hits), "by subject": {s: f"{sum(h)} of {len(h)}" for s, h in by.items()}}
    what = [told(" ".join(a[:1]), row["class"]) for row, a in zip(key, given, strict=True)]
    where = [told(" ".join(a), row["scene"]) for row, a in zip(key, given, strict=True) if row["scene"]]
    missed = [f"{row['prompt']}: {' / '.join(a)}" for row, a, hit in zip(key, given, what, strict=True) if not hit]
    return {"class named": share(what), "scene named": share(where), "missed": missed}


def share(hits: list) -> str:
    """`n of m`."""
    return f"{sum(hits)} of {len(hits)}"


def keep(part: str, found: dict) -> None:
    """Write a score into the files of results, in place of the same part's last one."""
    path = RESULTS / f"blind-judging_cpu_{time.strftime('%Y%m')}.json"
    parts = json.loads(path.read_text("utf-8")) if path.exists() else {}
    parts[part] = found
    path.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    lines = ["# The embedded base and the demo, judged blind", ""]
    for name, one in parts.items():
        lines += [f"## {name}", "", f"commit {one['commit']}; {one['machine']}", ""]
        lines += [f"- {what}: {told}" for what, told in one.items() if isinstance(told, str) and " of " in told]
        lines += [f"- {subject}: {told}" for subject, told in one.get("by subject", {}).items()]
        lines += [f"- not recognized, as prompt: answer / place: {told}" for told in one.get("missed", [])] + [""]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Draw the pages, or score a judge's answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sheet", "subjects", "score"])
    parser.add_argument("out", type=Path)
    parser.add_argument("answers", type=Path, nargs="?")
    parser.add_argument("--run", type=Path, help="the demo's folder")
    parser.add_argument("--base", default=str(BASE), help="the base's folder, or true scenes: scenes, or scenes-vae")
    parser.add_argument("--noise", type=int, default=0, help="the seed of the sheet's noise")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--part", help="keep the score in the file of results, as this part of it")
    parser.add_argument("--judge", default="not said", help="who judged, for the file of results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "score":
        found = score(json.loads((options.out / "key.json").read_text()), json.loads(options.answers.read_text()))
        print(json.dumps(found, indent=1))
        if options.part:
            keep(options.part, {"commit": commit(), "machine": f"judge: {options.judge}", **found})
        return
    drawn = {"sheet": lambda: draw_sheet(options.out, options.base, options.seed, options.noise),
             "subjects": lambda: draw_subjects(options.out, options.run, options.seed)}[options.what]()  # fmt: skip
    (options.out / "key.json").write_text(json.dumps(drawn, indent=1) + "\n")


if __name__ == "__main__":
    main()
