"""How good the embedded upscaler is: `python benchmarks/upscaler_quality.py`.

Writes benchmarks/results/<name>_<device>_<year and month>.{md,json,png}. Scenes are of seeds and art that no training
saw. Each is rendered at 128 pixels, which is the truth, and reduced to 64, which is enlarged again. In the set "coded",
the base's VAE codes the small picture first, so it has the faults of what the base draws. What the base draws itself
has no truth; of that, the picture shows some.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measures import mean_interval
from PIL import Image

from dbtrain.bench import commit
from dbtrain.evaluate.features import load_identity
from dbtrain.evaluate.intervals import shown
from dbtrain.evaluate.patches import patch_distances
from dbtrain.models.load import quiet_libraries
from dbtrain.tiny import BASE, UPSCALER

sys.path.append(str(Path(__file__).resolve().parents[1] / "embedded"))

from dbtrain_embedded import pool, upscaler, world

RESULTS = Path(__file__).parent / "results"
SETTINGS = ((0, 1), (0, 4), (20, 1))
"""(level of the guide's noise, sampling steps) of the upscaler's rows; the first one is what it is used with."""
PROMPTS = ("a photo of a dog on the beach", "a robot in space", "a photo of a red car", "a penguin wearing a crown")


def to_images(pictures: torch.Tensor) -> list:
    """PIL pictures of (N, 3, H, W) in [-1, 1]."""
    arrays = pictures.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def tile_distance(identity, one: Image.Image, other: Image.Image) -> float:
    """The mean patch distance of the quarters of two pictures of 128 pixels: the encoder sees 64."""
    boxes = [(x, y, x + 64, y + 64) for x in (0, 64) for y in (0, 64)]
    return float(np.mean([float(patch_distances(identity, [one.crop(box), other.crop(box)])) for box in boxes]))


def ways(pipe, low: list, captions: list, settings: tuple) -> dict:
    """Name -> pictures (N, 3, 128, 128) in [-1, 1] of every way to enlarge small PIL pictures."""
    guide = upscaler.to_tensor([upscaler.enlarged(picture) for picture in low])
    found = {"bicubic": guide}
    for level, steps in settings:
        parts = [slice(start, start + 8) for start in range(0, len(low), 8)]
        drawn = [upscaler.sample(pipe, guide[part], captions[part], level, steps) for part in parts]
        found[f"upscaler, level {level}, steps {steps}"] = torch.cat(drawn)
    return found


def measure(count: int, folder: Path) -> tuple:
    """(set -> way -> measure -> one value a scene, seconds of processor time a picture, rows of pictures)."""
    from diffusers import IFSuperResolutionPipeline, StableDiffusionPipeline

    pipe = IFSuperResolutionPipeline.from_pretrained(folder)
    base = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    for each in (pipe, base):
        each.set_progress_bar_config(disable=True)
    drawn = [world.scene(pool.HELD_OUT_SEED + index, "heldout", upscaler.SIDE) for index in range(count)]
    truth, captions = [scene[0] for scene in drawn], [scene[1] for scene in drawn]
    high = upscaler.to_tensor(truth)
    lanczos, box = ([upscaler.reduced(picture, kernel) for picture in truth] for kernel in upscaler.FILTERS[:2])
    with torch.no_grad():
        coded = to_images(base.vae(upscaler.to_tensor(lanczos)).sample)
    sets = {"reduced by Lanczos, as dbtrain does": lanczos, "reduced by a box": box, "Lanczos, coded by the VAE": coded}
    identity, found, rows = load_identity(), {}, []
    began = time.process_time()
    ways(pipe, lanczos[:8], captions[:8], SETTINGS[:1])
    per_picture = (time.process_time() - began) / 8
    for number, (name, low) in enumerate(sets.items()):
        pictures = ways(pipe, low, captions, SETTINGS if number == 0 else SETTINGS[:1])
        found[name] = {
            way: {
                "PSNR": upscaler.psnr(made, high).tolist(),
                "patch distance": [tile_distance(identity, a, b) for a, b in zip(to_images(made), truth, strict=True)],
                "border error": upscaler.border_error(made, high).tolist(),
            }
            for way, made in pictures.items()
        }
        shown_ways = list(pictures.values())[:2]
        rows += [[low[i].resize((128, 128), 0), *(to_images(each[i : i + 1])[0] for each in shown_ways), truth[i]]
                 for i in range(min(4, count))]  # fmt: skip
    generators = [torch.Generator().manual_seed(index) for index in range(len(PROMPTS))]
    small = base(list(PROMPTS), num_inference_steps=25, guidance_scale=3.0, generator=generators).images
    bicubic, ours = map(to_images, ways(pipe, small, list(PROMPTS), SETTINGS[:1]).values())
    blank = Image.new("RGB", (128, 128), (255, 255, 255))
    rows += [[small[i].resize((128, 128), 0), bicubic[i], ours[i], blank] for i in range(len(small))]
    return found, per_picture, rows


def sheet(rows: list, groups: int = 2) -> Image.Image:
    """The rows of four pictures, `groups` of them side by side, 2 pixels apart."""
    side, height = upscaler.SIDE + 2, -(-len(rows) // groups)
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
        f"{result['machine']}; commit {result['commit']}; {result['bytes'] / 1e6:.1f} MB;",
        f"{result['per_picture_s']:.2f} s of processor time a picture, on a machine that other work used too.",
        "Held-out art, 64 to 128 pixels; mean over the scenes [95 % interval]. PSNR in dB and patch distance (quarter",
        "by quarter) are to the scene rendered at 128 pixels. Differences are to bicubic, scene by scene.",
        f"Border error: root mean square, of 255, of the pixels less than {upscaler.MARGIN} from the border.",
        "",
    ]
    for name, found in result["found"].items():
        plain = found["bicubic"]
        columns = {"PSNR": "more than bicubic", "patch distance": "less than bicubic", "border error": "more"}
        names = ("way", *(name for pair in columns.items() for name in pair))
        lines += [f"## {name} ({len(plain['PSNR'])} scenes)", ""]
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for way, values in found.items():
            cells = []
            for measured, sign in (("PSNR", 1), ("patch distance", -1), ("border error", 1)):
                gained = [sign * (a - b) for a, b in zip(values[measured], plain[measured], strict=True)]
                cells += [shown(mean_interval(values[measured]).row())]
                cells += ["" if way == "bicubic" else shown(mean_interval(gained).row())]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "The picture beside this file, four scenes of each set: small, bicubic, upscaler, true. Then what the base",
        "draws: small, bicubic, upscaler.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure everything and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=48, help="scenes of each set")
    parser.add_argument("--name", default="upscaler-quality", help="what the result files are called")
    parser.add_argument("--folder", type=Path, default=UPSCALER, help="the pipeline folder to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the files are written")
    options = parser.parse_args()
    quiet_libraries()
    measured = commit()
    found, per_picture, rows = measure(options.count, options.folder)
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    result = {"machine": machine, "commit": measured, "bytes": size, "per_picture_s": per_picture, "found": found}
    target = options.out / f"{options.name}_cpu_{time.strftime('%Y%m')}"
    sheet(rows).save(target.with_suffix(".png"), optimize=True)
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
