"""How good the embedded base and its encoders are: `python benchmarks/tiny_quality.py`.

Writes benchmarks/results/tiny-quality_cpu_202611.{md,json,png}. Everything is measured on seeds or art that no
model saw: scenes from `pool.HELD_OUT_SEED` on (training art), and the held-out art sets.
Generation: DDIM, 25 steps, guidance 3.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dbtrain.tiny import ASSETS, BASE, CLIP, IDENTITY, pool, sprites, world
from dbtrain.tiny.scenery import SCENES
from dbtrain.tiny.world import Facts

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


class Clip:
    """The CLIP-style encoder: unit embeddings of pictures and texts."""

    def __init__(self):
        from transformers import CLIPModel, CLIPTokenizer

        self.model, self.tokenizer = (
            CLIPModel.from_pretrained(CLIP).eval(),
            CLIPTokenizer.from_pretrained(BASE / "tokenizer"),
        )

    @torch.no_grad()
    def images(self, pictures: np.ndarray) -> np.ndarray:
        """(N, 128) of uint8 pictures."""
        found = [
            self.model.get_image_features(pixel_values=pool.to_tensor(p)).pooler_output
            for p in np.array_split(pictures, -(-len(pictures) // 128))
        ]
        return torch.nn.functional.normalize(torch.cat(found), dim=-1).numpy()

    @torch.no_grad()
    def texts(self, texts: list) -> np.ndarray:
        """(N, 128) of captions."""
        ids = self.tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True).input_ids
        return torch.nn.functional.normalize(self.model.get_text_features(input_ids=ids).pooler_output, dim=-1).numpy()

    def choose(self, embeddings: np.ndarray, options: list) -> np.ndarray:
        """For each picture, the index of the nearest of its own `options[i]` (lists of equal length)."""
        texts = self.texts([text for row in options for text in row]).reshape(len(options), len(options[0]), -1)
        return np.einsum("nd,nkd->nk", embeddings, texts).argmax(axis=1)


def prompt(noun: str, phrase: str) -> str:
    """`a photo of a <noun> <phrase>`."""
    return f"a photo of {world.article(noun)} {phrase}".strip()


def class_accuracy(clip: Clip, pictures: np.ndarray, nouns: list, phrases: list) -> float:
    """Share of pictures whose class wins over all classes, the scene phrase being given."""
    classes = list(sprites.CLASSES)
    options = [[prompt(c, phrase) for c in classes] for phrase in phrases]
    return float(np.mean(clip.choose(clip.images(pictures), options) == [classes.index(n) for n in nouns]))


def scene_accuracy(clip: Clip, pictures: np.ndarray, nouns: list, places: list) -> float:
    """Share of pictures whose place wins over all places and plain, the class being given."""
    names = list(SCENES)
    options = [[prompt(noun, SCENES[name][1][0]) for name in names] for noun in nouns]
    return float(np.mean(clip.choose(clip.images(pictures), options) == [names.index(p) for p in places]))


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


def retrieval(clip: Clip, split: str, count: int = 500) -> dict:
    """Top-1 image-to-text retrieval among the distinct captions of `count` scenes; zero-shot class and place."""
    images, captions, _ = pool.held_out(count, 5000, split)
    distinct = sorted(set(captions))
    best = (clip.images(images) @ clip.texts(distinct).T).argmax(axis=1)
    pictures, nouns, places = clean_scenes(split, 416)
    return {
        "retrieval top-1": float(np.mean([distinct[b] == c for b, c in zip(best, captions, strict=True)])),
        "captions": len(distinct),
        "zero-shot class": class_accuracy(clip, pictures, nouns, [SCENES[p][1][0] for p in places]),
        "zero-shot scene": scene_accuracy(clip, pictures, nouns, places),
    }


def area_under_curve(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The chance that a positive scores above a negative (ties count half)."""
    order = np.sort(negatives)
    below, upto = np.searchsorted(order, positives, "left"), np.searchsorted(order, positives, "right")
    return float(np.mean((below + upto) / 2) / len(order))


@torch.no_grad()
def identity_states(pictures: np.ndarray) -> np.ndarray:
    """Unit [CLS] states (N, 128) of the identity encoder."""
    from transformers import ViTModel

    model = ViTModel.from_pretrained(IDENTITY, add_pooling_layer=False).eval()
    return torch.nn.functional.normalize(
        model(pixel_values=pool.to_tensor(pictures)).last_hidden_state[:, 0], dim=-1
    ).numpy()


def identity_quality(split: str, scenes: int = 4) -> dict:
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
    states, owner = identity_states(np.stack(pictures)), np.asarray(owner)
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


def generated_quality(pipe, clip: Clip, each: int, steps: int) -> dict:
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
    chosen = clip.choose(clip.images(plain), [[prompt(c, "") for c in classes]] * len(plain))
    hits = {c: float(np.mean(chosen[[n == c for n in nouns]] == classes.index(c))) for c in classes}
    return {
        "class accuracy, plain prompt": float(np.mean(list(hits.values()))),
        "pictures, plain prompt": len(plain),
        "class accuracy, placed": class_accuracy(clip, placed, [n for n, _ in pairs], phrases),
        "scene accuracy, placed": scene_accuracy(clip, placed, [n for n, _ in pairs], [p for _, p in pairs]),
        "pictures, placed": len(placed),
        "by class": hits,
    }


def vae_quality(pipe, count: int = 512) -> dict:
    """Reconstruction MAE in [-1, 1] from the posterior mean, training art and held-out art."""
    from dbtrain.tiny.autoencoder import mae_of

    found = {}
    for split in ("train", "heldout"):
        images = pool.to_tensor(pool.held_out(count, 20_000, split)[0])
        found[split] = float(np.mean([mae_of(pipe.vae, part) for part in images.split(64)]))
    return found


def report(found: dict) -> str:
    """The results as Markdown."""
    gen = found["generated"]
    lines = [
        "# Quality of the embedded base",
        "",
        f"{found['machine']}; {found['seconds']:.0f} s; DDIM {found['steps']} steps, guidance 3.",
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
    options = parser.parse_args()
    started = time.monotonic()
    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    clip = Clip()
    prompts = [p for line in SHEET.splitlines() for p in line.split("|")]
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / "tiny-quality_cpu_202611"
    contact_sheet(generate(pipe, prompts, 0, options.steps)).save(target.with_suffix(".png"), optimize=True)
    found = {"steps": options.steps, "prompts": prompts, "vae": vae_quality(pipe)}
    found["clip"] = {split: retrieval(clip, split) for split in ("train", "heldout")}
    found["identity"] = {split: identity_quality(split) for split in ("train", "heldout")}
    found["generated"] = generated_quality(pipe, clip, options.each, options.steps)
    found["asset_bytes"] = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    found["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    found["seconds"] = time.monotonic() - started
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(report(found), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
