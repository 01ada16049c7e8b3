"""How good the embedded upscaler is: `python benchmarks/upscaler_quality.py`.

Writes benchmarks/results/<name>_<device>_<year and month>.{md,json,png}. Scenes are of seeds, and in one set of art,
that no model saw. Each is rendered at 128 pixels, which is the truth, and reduced to 64, which is enlarged again. In
the set "coded", the base's VAE codes the small picture first, so that it has the faults of what the base draws. The
base's own pictures have no truth: of them it is measured whether the enlarged picture, reduced again, is the same.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
from detail import sharpness, tile_distances, to_image
from measures import mean_interval
from PIL import Image

from dbtrain.bench import commit
from dbtrain.evaluate.features import load_identity
from dbtrain.evaluate.intervals import shown
from dbtrain.tiny import BASE

sys.path.append(str(Path(__file__).resolve().parents[1] / "embedded"))

from dbtrain_embedded import pool, upscaler, world

RESULTS = Path(__file__).parent / "results"
SPLITS = {"unseen scenes": "train", "held-out art": "heldout"}
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SETTINGS = ((0, 1), (20, 1), (100, 1), (0, 2), (0, 4), (0, 10))
"""(level of the guide's noise, sampling steps) of the upscaler's rows; the first one is what it is used with."""
PROMPTS = """a photo of a dog on the beach|a photo of a robot in space|a photo of a cat on top of a purple rug
a photo of a bus with a city in the background|a photo of a teapot|a photo of a red car|a photo of a lion at night
a penguin wearing a crown"""


def base_pictures(pipe, count: int) -> tuple:
    """(PIL pictures of 64 x 64, prompts) that the base draws, in 25 steps at guidance 3."""
    lines = [prompt for line in PROMPTS.splitlines() for prompt in line.split("|")]
    prompts = [lines[i % len(lines)] for i in range(count)]
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipe(prompts, num_inference_steps=25, guidance_scale=3.0, generator=generators).images, prompts


def scores(pictures: torch.Tensor, high: torch.Tensor, identity) -> dict:
    """Each measure of one way to enlarge, as one value a picture."""
    return {
        "PSNR": upscaler.psnr(pictures, high).tolist(),
        "patch distance": tile_distances(identity, pictures, high).tolist(),
        "sharpness": (sharpness(pictures) / sharpness(high)).tolist(),
    }


def by_filter(low: list, kernel: Image.Resampling) -> torch.Tensor:
    """Pictures (N, 3, 128, 128) in [-1, 1]: small PIL pictures enlarged by one of PIL's filters."""
    return upscaler.to_tensor([picture.resize((upscaler.SIDE,) * 2, kernel) for picture in low])


def ways(models, tokenizer, low: list, captions: list, settings: tuple) -> dict:
    """Name -> pictures (N, 3, 128, 128) of every way to enlarge small PIL pictures."""
    found = {name: by_filter(low, kernel) for name, kernel in FILTERS.items()}
    guide = upscaler.to_tensor([upscaler.enlarged(picture) for picture in low])
    for level, steps in settings:
        name = f"upscaler, level {level}, {steps} steps"
        found[name] = upscaler.sample(models, tokenizer, guide, captions, level, steps)
    return found


def scenes(count: int, split: str) -> tuple:
    """(high (N, 3, 128, 128) in [-1, 1], PIL pictures of 64 x 64, captions) of scenes that no training sees."""
    drawn = [world.scene(pool.HELD_OUT_SEED + index, split, upscaler.SIDE) for index in range(count)]
    high = [picture for picture, _, _ in drawn]
    return upscaler.to_tensor(high), [upscaler.reduced(picture) for picture in high], [scene[1] for scene in drawn]


def measure(count: int, folder: Path) -> tuple:
    """(found, sheet): every score of every set, and rows of pictures to look at."""
    from diffusers import StableDiffusionPipeline

    models, tokenizer = upscaler.load(folder)
    base = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    base.set_progress_bar_config(disable=True)
    identity, found, rows = load_identity(), {}, []
    sets = {name: scenes(count, split) for name, split in SPLITS.items()}
    high, low, captions = sets["held-out art"]
    with torch.no_grad():
        coded = base.vae(upscaler.to_tensor(low)).sample
    sets["held-out art, coded"] = (high, [to_image(picture) for picture in coded], captions)
    for name, (high, low, captions) in sets.items():
        drawn = ways(models, tokenizer, low, captions, SETTINGS if name == "held-out art" else SETTINGS[:3])
        found[name] = {way: scores(pictures, high, identity) for way, pictures in drawn.items()}
        first = [by_filter(low, Image.Resampling.NEAREST), *list(drawn.values())[1:3], high]
        rows += [[to_image(pictures[i]) for pictures in first] for i in range(min(4, count))]
    low, captions = base_pictures(base, count // 2)
    drawn = ways(models, tokenizer, low, captions, SETTINGS[:3])
    back = {way: torch.nn.functional.avg_pool2d(pictures, 2) for way, pictures in drawn.items()}
    found["the base's pictures, reduced again"] = {
        way: {
            "PSNR": upscaler.psnr(pictures, upscaler.to_tensor(low)).tolist(),
            "sharpness": sharpness(drawn[way]).tolist(),
        }
        for way, pictures in back.items()
    }
    first = [by_filter(low, Image.Resampling.NEAREST), *list(drawn.values())[1:4]]
    rows += [[to_image(pictures[i]) for pictures in first] for i in range(min(8, len(low)))]
    return found, sheet(rows)


def sheet(rows: list, groups: int = 3) -> Image.Image:
    """The rows of four pictures, `groups` of them side by side, 2 pixels apart."""
    side = upscaler.SIDE + 2
    height = -(-len(rows) // groups)
    page = Image.new("RGB", (groups * (4 * side + 8), height * side), (255, 255, 255))
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            page.paste(image, (number % groups * (4 * side + 8) + column * side, number // groups * side))
    return page


def report(result: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# Quality of the embedded upscaler",
        "",
        f"{result['machine']}; commit {result['commit']}; {result['processor_s']:.0f} s of processor time.",
        "Mean over the pictures [95 % interval]. Sharpness is relative to the true picture's, where there is one.",
        "",
    ]
    for name, ways_of in result["found"].items():
        count = len(next(iter(ways_of.values()))["PSNR"])
        names = list(next(iter(ways_of.values())))
        lines += [
            f"## {name} ({count} pictures)",
            "",
            f"| way | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for way, values in ways_of.items():
            cells = [shown(mean_interval(values[measure]).row()) for measure in names]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "The picture beside this file, for scenes of the three sets in order: small, bicubic, upscaler, true. Then, of",
        "the base's pictures: small, bicubic, upscaler at levels 0 and 20.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure everything and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=48, help="scenes of each set")
    parser.add_argument("--name", default="upscaler-quality", help="what the result files are called")
    parser.add_argument("--folder", type=Path, default=upscaler.UPSCALER, help="the pipeline folder to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the files are written")
    options = parser.parse_args()
    started, measured = time.process_time(), commit()
    found, page = measure(options.count, options.folder)
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    result = {"machine": machine, "commit": measured, "bytes": size, "found": found}
    result["processor_s"] = time.process_time() - started
    target = options.out / f"{options.name}_cpu_{time.strftime('%Y%m')}"
    page.save(target.with_suffix(".png"), optimize=True)
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
