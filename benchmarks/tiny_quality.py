"""How good the embedded base and its encoders are: `python benchmarks/tiny_quality.py`.

Writes benchmarks/results/<name>_<device>_<year and month>.{md,json,png}. Everything is measured on seeds or art that no
model saw: scenes from `pool.HELD_OUT_SEED` on (training art), and the held-out art sets.
Generation: DDIM, 25 steps, guidance 3.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measures import choose, zero_shot
from PIL import Image

from dbtrain.tiny import ASSETS, BASE

sys.path.append(str(Path(__file__).resolve().parents[1] / "embedded"))

from dbtrain.evaluate.features import Encoder, load_identity, load_pair
from dbtrain_embedded import pool, sprites, world
from dbtrain_embedded.scenery import SCENES
from dbtrain_embedded.world import Facts

RESULTS = Path(__file__).parent / "results"
GOALS = {"class accuracy, generated": 0.80, "scene accuracy, generated": 0.90, "VAE MAE": 0.04}

SHEET = """a photo of a dog|a photo of a cat|a photo of a rabbit|a photo of a bear|a photo of a fox|a photo of a lion
a photo of an owl|a photo of a penguin|a photo of a frog|a photo of a turtle|a photo of an elephant
a photo of a fish|a photo of a car|a photo of a bus|a photo of a rocket|a photo of an airplane|a photo of a robot
a photo of a teapot|a photo of a backpack|a photo of a clock|a photo of a sneaker|a photo of a guitar
a photo of an umbrella|a photo of a cake|a photo of a doughnut|a photo of a pizza|a photo of a red car on the beach
a photo of a blue owl|a green dog|a purple backpack|a pink elephant|a yellow fish|a dog in the jungle
a dog in the snow|a cat on the beach|a dog on a cobblestone street|a robot on top of green grass
a teapot on top of pink fabric|a backpack on top of a wooden floor|a bus with a city in the background
a penguin with a mountain in the background|a turtle floating on top of water|an elephant in the desert
a robot in space|a cat on top of a purple rug|a lion at night|a car at sunset|a rocket in space|a dog wearing a hat
a cat wearing sunglasses|a bear wearing a crown|a penguin wearing a bow|a frog wearing a hat in the snow
a fox wearing sunglasses on the beach|a lion wearing a cap|a rabbit wearing a crown in the jungle
a pencil sketch of a cat|a pencil sketch of a teapot|pixel art of a dog|pixel art of a rocket
a watercolour painting of a fish|a watercolour painting of a fox in the snow|a close-up photo of a clock
a photo of a sks dog on the beach"""


@torch.no_grad()
def generate(pipe, prompts: list, seed: int, steps: int, guidance: float = 3.0, batch: int = 32) -> np.ndarray:
    """uint8 pictures (N, 64, 64, 3), one a prompt; noise from `seed` and the prompt's place in the list."""
    found = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 100_000 + start + i) for i in range(len(part))]
        images = pipe(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
        ).images
        found.append((images * 255).round().astype(np.uint8))
    return np.concatenate(found)


def contact_sheet(images: np.ndarray, columns: int = 8, zoom: int = 2) -> Image.Image:
    """The pictures in rows of `columns`, each `zoom` times larger, 2 pixels apart."""
    side = images.shape[1] * zoom
    sheet = Image.new("RGB", (columns * (side + 2), -(-len(images) // columns) * (side + 2)), (255, 255, 255))
    for index, image in enumerate(images):
        sheet.paste(
            Image.fromarray(image).resize((side, side), Image.NEAREST),
            (index % columns * (side + 2), index // columns * (side + 2)),
        )
    return sheet


def prompt(noun: str, phrase: str) -> str:
    """`a photo of a <noun> <phrase>`."""
    return f"a photo of {world.article(noun)} {phrase}".strip()


def pictures_of(pixels: np.ndarray) -> list[Image.Image]:
    """The pictures of uint8 pixels (N, 64, 64, 3)."""
    return [Image.fromarray(one) for one in pixels]


def class_choices(pair: Encoder, pixels: np.ndarray, phrases: list) -> np.ndarray:
    """The number of the class that wins over all classes, the scene phrase being given."""
    options = [[prompt(noun, phrase) for noun in sprites.CLASSES] for phrase in phrases]
    return choose(pair, pictures_of(pixels), options).numpy()


def class_accuracy(pair: Encoder, pixels: np.ndarray, nouns: list, phrases: list) -> float:
    """Share of pictures whose own class wins."""
    classes = list(sprites.CLASSES)
    return float(np.mean(class_choices(pair, pixels, phrases) == [classes.index(noun) for noun in nouns]))


def scene_accuracy(pair: Encoder, pixels: np.ndarray, nouns: list, places: list) -> float:
    """Share of pictures whose place wins over all places and plain, the class being given."""
    names = list(SCENES)
    options = [[prompt(noun, SCENES[name][1][0]) for name in names] for noun in nouns]
    return float(zero_shot(pair, pictures_of(pixels), options, [names.index(place) for place in places]).mean())


def clean_scenes(split: str, count: int) -> tuple:
    """(pictures, nouns, places) of photo-style, natural-colour scenes of one atlas, every class in turn."""
    nouns = [list(sprites.CLASSES)[i % len(sprites.CLASSES)] for i in range(count)]
    places = [list(SCENES)[i % len(SCENES)] for i in range(count)]
    pictures = []
    for index, (noun, place) in enumerate(zip(nouns, places, strict=True)):
        rng = world.stream(pool.HELD_OUT_SEED + index, 7)
        sprite = sprites.of_noun(noun, split)[int(rng.integers(len(sprites.of_noun(noun, split))))]
        pictures.append(np.asarray(world.render(Facts(noun, sprite, place), rng, split)))
    return np.stack(pictures), nouns, places


def retrieval(pair: Encoder, split: str, count: int = 500) -> dict:
    """Top-1 image-to-text retrieval among the distinct captions of `count` scenes; zero-shot class and place."""
    images, captions, _ = pool.held_out(count, 5000, split)
    distinct = sorted(set(captions))
    best = (pair.images(pictures_of(images)) @ pair.texts(distinct).T).argmax(1).tolist()
    pictures, nouns, places = clean_scenes(split, 416)
    return {
        "retrieval top-1": float(np.mean([distinct[b] == c for b, c in zip(best, captions, strict=True)])),
        "captions": len(distinct),
        "zero-shot class": class_accuracy(pair, pictures, nouns, [SCENES[p][1][0] for p in places]),
        "zero-shot scene": scene_accuracy(pair, pictures, nouns, places),
    }


def area_under_curve(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The chance that a positive scores above a negative (ties count half)."""
    order = np.sort(negatives)
    below, upto = np.searchsorted(order, positives, "left"), np.searchsorted(order, positives, "right")
    return float(np.mean((below + upto) / 2) / len(order))


def identity_quality(identity: Encoder, split: str, scenes: int = 4) -> dict:
    """Same-subject vs same-class (another drawing) and vs other-class pairs of one atlas, all across scenes."""
    rows = [i for i, row in enumerate(sprites.load(split)[0]) if row.noun in sprites.CLASSES]
    places, owner, pictures = list(SCENES), [], []
    for index in rows:
        for turn in range(scenes):
            rng = world.stream(pool.HELD_OUT_SEED + index, 20 + turn)
            place = places[(index * 5 + turn * 3) % len(places)]
            pictures.append(
                np.asarray(world.render(Facts(sprites.load(split)[0][index].noun, index, place), rng, split))
            )
            owner.append(index)
    states, owner = identity.images(pictures_of(np.stack(pictures))).numpy(), np.asarray(owner)
    noun = np.asarray([sprites.load(split)[0][i].noun for i in owner])
    name = np.asarray([sprites.load(split)[0][i].name for i in owner])
    cosine, upper = states @ states.T, np.triu(np.ones((len(owner),) * 2, bool), 1)
    same = (owner[:, None] == owner) & upper
    mates = (noun[:, None] == noun) & (name[:, None] != name) & upper
    others = (noun[:, None] != noun) & upper
    return {
        "AUC same subject vs same class": area_under_curve(cosine[same], cosine[mates]),
        "AUC same subject vs other class": area_under_curve(cosine[same], cosine[others]),
        "cosine same subject": float(cosine[same].mean()),
        "cosine same class": float(cosine[mates].mean()),
        "cosine other class": float(cosine[others].mean()),
    }


def generated_quality(pipe, pair: Encoder, each: int, steps: int) -> dict:
    """Class accuracy of `a photo of a <class>` (`each` a class); class and scene accuracy of every place x classes."""
    nouns = [noun for noun in sprites.CLASSES for _ in range(each)]
    plain = generate(pipe, [prompt(n, "") for n in nouns], 1, steps)
    pairs = [
        (list(sprites.CLASSES)[(3 * i + j * 7) % len(sprites.CLASSES)], place)
        for i, place in enumerate(world.PLACES)
        for j in range(2 * each)
    ]
    phrases = [SCENES[place][1][0] for _, place in pairs]
    placed = generate(pipe, [prompt(n, phrase) for (n, _), phrase in zip(pairs, phrases, strict=True)], 2, steps)
    classes = list(sprites.CLASSES)
    chosen = class_choices(pair, plain, [""] * len(plain))
    hits = {c: float(np.mean(chosen[[n == c for n in nouns]] == classes.index(c))) for c in classes}
    return {
        "class accuracy, plain prompt": float(np.mean(list(hits.values()))),
        "pictures, plain prompt": len(plain),
        "class accuracy, placed": class_accuracy(pair, placed, [n for n, _ in pairs], phrases),
        "scene accuracy, placed": scene_accuracy(pair, placed, [n for n, _ in pairs], [p for _, p in pairs]),
        "pictures, placed": len(placed),
        "by class": hits,
    }


def vae_quality(pipe, count: int = 512) -> dict:
    """Reconstruction MAE in [-1, 1] from the posterior mean, training art and held-out art."""
    from dbtrain_embedded.autoencoder import mae_of

    found = {}
    for split in ("train", "heldout"):
        images = pool.to_tensor(pool.held_out(count, 20_000, split)[0])
        found[split] = float(np.mean([mae_of(pipe.vae, part) for part in images.split(64)]))
    return found


@torch.no_grad()
def denoiser_quality(pipe, count: int = 256) -> dict:
    """Mean |v - v_theta|^2 in each quarter of the timesteps: scenes of the pool, unseen ones, and those without words.

    What the pool's scenes have less than unseen ones was learnt by heart; what words lower is read from the caption.
    """
    drawn = {"pool": [world.scene(seed) for seed in range(count)]}
    drawn["unseen"] = drawn["unseen, no caption"] = [world.scene(pool.HELD_OUT_SEED + 30_000 + i) for i in range(count)]
    alphas, found = pipe.scheduler.alphas_cumprod, {}
    for name, scenes in drawn.items():
        noise = torch.Generator().manual_seed(7)
        latents = pipe.vae.encode(pool.to_tensor(np.stack([np.asarray(s[0]) for s in scenes]))).latent_dist.mean
        words = ["" if "no caption" in name else s[1] for s in scenes]
        ids = pipe.tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
        context, means = pipe.text_encoder(ids).last_hidden_state, []
        for quarter in range(4):
            t = torch.randint(250 * quarter, 250 * (quarter + 1), (count,), generator=noise)
            alpha, sigma = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
            epsilon = torch.randn(latents.shape, generator=noise)
            v = pipe.unet(alpha * latents + sigma * epsilon, t, context).sample
            means.append(float((v - alpha * epsilon + sigma * latents).square().mean()))
        found[name] = means
    return found


def commit() -> str:
    """The short name of the commit that is measured, with a + where files differ from it."""
    asked = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(asked, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()


def report(found: dict) -> str:
    """The results as Markdown."""
    gen = found["generated"]
    lines = [
        "# Quality of the embedded base",
        "",
        f"{found['machine']}; commit {found['commit']}; {found['seconds']:.0f} s.",
        f"Pictures are drawn in {found['steps']} steps of DDIM at guidance 3.",
        "",
        "| what | measured | goal |",
        "|---|---|---|",
    ]
    rows = [
        (
            "zero-shot class accuracy of generated pictures, `a photo of a <class>`",
            gen["class accuracy, plain prompt"],
            ">= 0.80",
        ),
        ("the same, with a place in the prompt", gen["class accuracy, placed"], ""),
        ("scene accuracy of generated pictures", gen["scene accuracy, placed"], ">= 0.90"),
        ("VAE reconstruction MAE, unseen scenes", found["vae"]["train"], "<= 0.04"),
        ("VAE reconstruction MAE, held-out art", found["vae"]["heldout"], ""),
    ]
    rows += [
        (f"denoiser, |v - v_theta|^2 at timesteps {250 * q} to {250 * q + 249}, {name}", value, "")
        for name, values in found["denoiser"].items()
        for q, value in enumerate(values)
    ]
    for split, label in (("train", "unseen scenes"), ("heldout", "held-out art")):
        rows += [
            (f"CLIP pair, {label}: {key}", found["clip"][split][key], "")
            for key in ("retrieval top-1", "zero-shot class", "zero-shot scene")
        ]
        rows += [(f"identity encoder, {label}: {key}", value, "") for key, value in found["identity"][split].items()]
    lines += [f"| {name} | {value:.3f} | {goal} |" for name, value, goal in rows]
    lines += [
        "",
        "Retrieval is among "
        + ", ".join(f"{found['clip'][s]['captions']} distinct captions ({s})" for s in ("train", "heldout"))
        + ".",
        "",
        "Accuracy by class, `a photo of a <class>`: "
        + ", ".join(f"{c} {v:.2f}" for c, v in sorted(gen["by class"].items(), key=lambda i: i[1]))
        + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure everything and write the three files."""
    from diffusers import StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=8, help="generated pictures a class")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--name", default="tiny-quality", help="what the result files are called")
    options = parser.parse_args()
    started, measured = time.monotonic(), commit()
    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pair, identity = load_pair(), load_identity()
    prompts = [p for line in SHEET.splitlines() for p in line.split("|")]
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{options.name}_{pipe.device.type}_{time.strftime('%Y%m')}"
    contact_sheet(generate(pipe, prompts, 0, options.steps)).save(target.with_suffix(".png"), optimize=True)
    found = {"steps": options.steps, "prompts": prompts, "vae": vae_quality(pipe), "denoiser": denoiser_quality(pipe)}
    found["clip"] = {split: retrieval(pair, split) for split in ("train", "heldout")}
    found["identity"] = {split: identity_quality(identity, split) for split in ("train", "heldout")}
    found["generated"] = generated_quality(pipe, pair, options.each, options.steps)
    found["asset_bytes"] = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    found["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    found["commit"] = measured
    found["seconds"] = time.monotonic() - started
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(report(found), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
