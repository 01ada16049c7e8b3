"""What drawing the pictures of many subjects together saves: `python benchmarks/packed_drawing.py`.

The embedded base, random adapters on the layers of the recipe `tiny`. Each subject's pictures are drawn one subject
after another, and all together as rows of one stack, as `dbtrain evaluate` and `dbtrain study` do. The two ways
alternate; shown are medians of processor time of one thread, and how far pictures differ. Writes
packed-drawing_<device>_<year and month>.{md,json}.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from dbtrain.bench import commit
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import LoraWeights, adapter, matching_layers
from dbtrain.models.load import load_models
from dbtrain.models.sampling import draw_samples, make_pipeline, sampling_mode
from dbtrain.settings.config import RunConfig, SampleConfig
from dbtrain.settings.recipes import load

RESULTS = Path(__file__).parent / "results"
FAMILY = FAMILIES["sd"]


def random_adapter(models, config: RunConfig, seed: int) -> LoraWeights:
    """An adapter of the recipe's rank with small random matrices."""
    stream, matrices, rank = torch.Generator().manual_seed(seed), {}, config.lora.rank
    for path in matching_layers(models.denoiser, config.lora.targets):
        out, width = models.denoiser.get_submodule(path).weight.shape[:2]
        down, up = (torch.randn(*shape, generator=stream) for shape in ((rank, width), (out, rank)))
        matrices[path] = down * width**-0.5, up * 0.02
    return LoraWeights({"unet": matrices}, float(rank), rank)


def one_by_one(models, adapters: list, prompts: list[str], settings: SampleConfig) -> list:
    """Every subject's rows of pictures, a subject at a time."""
    drawn = []
    for own in adapters:
        with sampling_mode(models), adapter(FAMILY, models, own):
            drawn += draw_samples(make_pipeline(FAMILY, models), prompts, settings, 64)
    return drawn


def together(models, adapters: list, prompts: list[str], settings: SampleConfig) -> list:
    """The same pictures with all adapters as rows of one stack."""
    rows = [row for row in range(len(adapters)) for _ in prompts]
    batch = min(8, len(rows) * settings.images)
    with sampling_mode(models), adapter(FAMILY, models, *adapters, folds=True):
        return draw_samples(
            make_pipeline(FAMILY, models), prompts * len(adapters), settings, 64, batch=batch, rows=rows
        )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 3], help="prompts a subject, two images each")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load("tiny", [])
    models, rows = load_models(FAMILY, config.model), []
    for count in options.prompts:
        for subjects in options.subjects:
            adapters = [random_adapter(models, config, seed) for seed in range(subjects)]
            prompts = [f"a photo of a dog {where}".strip() for where in ("", "in the jungle", "on the beach")][:count]
            settings = SampleConfig(images=2, steps=options.steps, guidance=3.0)
            spent: dict = {one_by_one: [], together: []}
            for _ in range(options.turns):
                pictures = []
                for way, seconds in spent.items():
                    begin = time.process_time()
                    drawn = way(models, adapters, prompts, settings)
                    pictures.append([np.asarray(picture).astype(int) for row in drawn for picture in row])
                    seconds.append((time.process_time() - begin) / (subjects * count * 2))
            differ = max(int(np.abs(a - b).max()) for a, b in zip(*pictures))
            alone, joint = (statistics.median(seconds) for seconds in spent.values())
            rows.append({"subjects": subjects, "pictures a subject": 2 * count, "one by one (s)": round(alone, 4),
                         "together (s)": round(joint, 4), "ratio": round(alone / joint, 2), "levels apart": differ})
            print(rows[-1], flush=True)
    about = {"machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}", "commit": commit(),
             "steps": options.steps, "turns": options.turns}
    target = RESULTS / f"packed-drawing_cpu_{time.strftime('%Y%m')}"
    target.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    lines = ["# Pictures of many subjects, drawn one by one and together", "",
             (f"{about['machine']}; commit {about['commit']}. Processor seconds a picture, {options.steps} steps with "
             f"guidance, medians of {options.turns} turns."), "", "| " + " | ".join(rows[0]) + " |", "|---" * 6 + "|"]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    target.with_suffix(".md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
