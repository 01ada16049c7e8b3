"""The shape of the DreamBooth paper's tables on the embedded base: `python benchmarks/paper_shape.py`.

Trains every demo subject by the product's own path: with and without prior preservation (Table 3), and either way with
no and with a wrong class noun (Table 4). A picture has the same noise in every variant
and in the base row, so that rows are compared in pairs. Running again goes on where it was stopped; another recipe or
base needs another --out, and another --name, that one result does not replace the other: it writes
<name>_<device>_<year and month>.{md,json,png}. With several --seeds each subject counts once, as the mean of its seeds.
"""

import argparse
import csv
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from paper_shape_tables import BASE, GROUPS, write_results

from dbtrain.bench import commit
from dbtrain.evaluate.features import zero_shot
from dbtrain.evaluate.judge import Judge, Seen, load_judge, read_images
from dbtrain.evaluate.scores import METRICS
from dbtrain.families import FAMILIES
from dbtrain.models.family import Models
from dbtrain.models.load import base_digest, load_models, load_tokenizer
from dbtrain.models.sampling import generate, image_seed
from dbtrain.results.finished import finished_pipeline
from dbtrain.settings.config import RunConfig
from dbtrain.settings.recipes import load
from dbtrain.subjects.identifiers import allocate
from dbtrain.subjects.manifest import read_manifest
from dbtrain.tiny import DEMO
from dbtrain.train import train_manifest
from dbtrain.values import Subject

sys.path.append(str(Path(__file__).resolve().parents[1] / "embedded"))

from dbtrain_embedded.scenery import SCENES
from dbtrain_embedded.sprites import CLASSES
from dbtrain_embedded.world import PLACES, article

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Variant:
    """One way to train: the noun in class column and captions ("" is none), settings, and whether drift is measured."""

    noun: str
    overrides: tuple[str, ...] = ()
    drift: bool = False


VARIANTS = {
    "with prior": Variant("right", drift=True),
    "without prior": Variant("right", ("prior.weight=0",), drift=True),
    "no class noun": Variant("none"),
    "wrong class noun": Variant("wrong"),
    "no class noun, no prior": Variant("none", ("prior.weight=0",)),
    "wrong class noun, no prior": Variant("wrong", ("prior.weight=0",)),
}


@cache
def demo_nouns() -> tuple[str, ...]:
    """The classes of all demo subjects: their priors exist already, so a wrong noun costs no new ones."""
    return tuple(sorted({subject.class_noun for subject in read_manifest(DEMO)}))


def noun_of(variant: Variant, subject: Subject) -> str:
    """The class noun that a variant trains a subject with; a wrong one is drawn by the subject's id."""
    others = [noun for noun in demo_nouns() if noun != subject.class_noun]
    wrong = others[image_seed("wrong class noun", subject.id) % len(others)]
    return {"right": subject.class_noun, "none": "", "wrong": wrong}[variant.noun]


def write_manifest(path: Path, variant: Variant, subjects: list[Subject], identifiers: dict[str, str]) -> Path:
    """The manifest of a variant; identifiers are written out, so that all variants of a seed share them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["subject", "class", "images", "identifier", "caption"])
        for one in subjects:
            noun = noun_of(variant, one) or one.class_noun
            caption = f"a photo of {identifiers[one.id]}" if variant.noun == "none" else ""
            table.writerow([one.id, noun, ";".join(map(str, one.images)), identifiers[one.id], caption])
    return path


@dataclass(frozen=True)
class Picture:
    """One picture to draw: its group ("plain", "placed" or "class"), place, number in it, and prompt."""

    group: str
    place: str
    number: int
    prompt: str

    def file(self) -> str:
        """Its file name."""
        return f"{self.group}-{self.place.replace(' ', '-')}-{self.number:02d}.png"


def prompt(named: str, place: str = "plain") -> str:
    """`a photo of <named>` in a place of the world."""
    return f"a photo of {named} {SCENES[place][1][0]}".strip()


def pictures(named: str, subject: Subject, images: int, drift: bool) -> list[Picture]:
    """The plain prompt `images` times, every place twice, and if asked the class prompt `images` times."""
    plain = [Picture("plain", "plain", i, prompt(named)) for i in range(images)]
    placed = [Picture("placed", place, i, prompt(named, place)) for i in range(2) for place in PLACES]
    told = prompt(article(subject.class_noun))
    return plain + placed + [Picture("class", "plain", i, told) for i in range(images if drift else 0)]


def draw(cache: Path, run: str, wanted: list[Picture], seeds: list[int], config: RunConfig, opened) -> list[Path]:
    """The wanted pictures' files, drawn unless they are there; the cache holds for one run digest, prompts, seeds and
    sampling."""
    sample, about = config.sample, cache / "pictures.json"
    key = {"run": run, "sample": sample.model_dump(mode="json"), "seeds": seeds, "wanted": [asdict(p) for p in wanted]}
    text = json.dumps(key, indent=1)
    if not (about.exists() and about.read_text(encoding="utf-8") == text):
        cache.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)
        side, steps, precision = config.data.resolution, sample.steps, config.train.precision
        with opened() as pipeline:
            found = generate(pipeline, [p.prompt for p in wanted], seeds, side, steps, sample.guidance, precision, 16)
            for picture, image in zip(wanted, found):
                image.save(cache / picture.file())
        about.write_text(text, encoding="utf-8")
    return [cache / picture.file() for picture in wanted]


def scores_of(judge: Judge, subject: Subject, groups: dict[str, list[tuple[Picture, Path]]]) -> dict[str, float]:
    """Every score of one subject, variant and seed; absent where its pictures were not drawn."""
    photos, row = read_images(subject.images), {}
    for group, before in (("plain", ""), ("placed", "placed ")):
        prompts = [picture.prompt for picture, _ in groups[group]]
        plain = [prompt(article(subject.class_noun), picture.place) for picture, _ in groups[group]]
        number_N = torch.tensor([prompts.index(text) for text in prompts])
        drawn = Seen([file for _, file in groups[group]], number_N, plain, prompts)
        features = judge.features(photos, drawn, [file for _, file in groups["class"]])
        values = {key: metric.values(features) for key, metric in METRICS.items()}
        row |= {before + key: float(value.mean()) for key, value in values.items() if value.numel()}
    return row | recognized(judge, subject, groups)


def recognized(judge: Judge, subject: Subject, groups: dict[str, list[tuple[Picture, Path]]]) -> dict[str, float]:
    """Zero-shot accuracy: the place of placed pictures (class given), the class of plain and of class pictures."""
    places, classes = list(SCENES), list(CLASSES)
    by_place = [prompt(article(subject.class_noun), place) for place in places]
    by_class = [prompt(article(noun)) for noun in classes]
    asked = {"scene": ("placed", by_place), "class": ("plain", by_class), "drift class": ("class", by_class)}
    found = {}
    for name, (group, texts) in asked.items():
        images, own = read_images([file for _, file in groups[group]]), classes.index(subject.class_noun)
        truth = [places.index(p.place) if group == "placed" else own for p, _ in groups[group]]
        if images:
            found[f"{name} accuracy"] = float(zero_shot(judge.pair, images, [texts] * len(images), truth).mean())
    return found


def train_variants(options, config: RunConfig, subjects: list[Subject], seed: int) -> dict[str, dict[str, dict]]:
    """variant -> subject -> record, of training now or before; a subject that failed in a variant is missing there."""
    records = {}
    tokenizer = load_tokenizer(config.model.path)
    identifiers = allocate(tokenizer, subjects, config.identifier.tokens, seed)
    for name, variant in VARIANTS.items():
        folder = options.out / f"seed-{seed}" / name.replace(" ", "-")
        manifest = write_manifest(folder / "manifest.csv", variant, subjects, identifiers)
        settings = load(options.recipe, [*shared_settings(options), f"seed={seed}", *variant.overrides])
        print(f"== seed {seed}, {name}: training {len(subjects)} subjects", flush=True)
        done, failed = train_manifest(manifest, settings, folder, None)
        for subject, reason in failed.items():
            print(f"   {subject} failed: {reason}", flush=True)
        records[name] = {record["subject"]: record for record in done}
    return records


def shared_settings(options) -> list[str]:
    """The settings that all variants share."""
    return [f"prior.store={options.out / 'priors'}", "sample.images=0", "track.tensorboard=false", *options.overrides]


@dataclass
class Bench:
    """Everything that one command holds: options, settings, the loaded base and the encoders."""

    options: argparse.Namespace
    config: RunConfig
    base: Models
    judge: Judge

    def measure(self, subjects: list[Subject]) -> tuple[list[dict], dict]:
        """Rows (variant, seed, subject, scores, seconds), and the pictures by (variant, seed, subject)."""
        rows, sheets = [], {}
        for seed in self.options.seeds:
            records = train_variants(self.options, self.config, subjects, seed)
            # A subject that failed in one variant is left out of all: rows are compared in pairs.
            sound = [one for one in subjects if all(one.id in found for found in records.values())]
            for name in (BASE, *VARIANTS):
                for subject in sound:
                    record = records.get(name, {}).get(subject.id)
                    row, sheets[name, seed, subject.id] = self.measure_one(name, subject, seed, record)
                    rows.append(row)
        return rows, sheets

    def measure_one(self, name: str, subject: Subject, seed: int, record: dict | None) -> tuple[dict, dict]:
        """The row and the pictures by group of one variant (the base for None) of one subject."""
        if record and record["base_digest"] != base_digest(self.base):
            raise SystemExit(
                f"{subject.id}, {name}: trained from another base than the one now loaded; use another --out"
            )
        begin, at = time.perf_counter(), Path(f"seed-{seed}") / name.replace(" ", "-")
        variant = VARIANTS[name] if record else None
        named = f"{record['identifier']} {noun_of(variant, subject)}".strip() if record else article(subject.class_noun)
        wanted = pictures(named, subject, self.options.images, variant is not None and variant.drift)
        seeds = [image_seed("paper-shape", seed, subject.id, p.place, p.number) for p in wanted]
        folder = self.options.out / at / "subjects" / subject.id if record else None
        run = record["run"] if record else base_digest(self.base)
        cache = self.options.out / "pictures" / at / subject.id
        family = FAMILIES[self.config.model.family]
        opened = partial(finished_pipeline, folder, family, self.base, self.config)
        files = draw(cache, run, wanted, seeds, self.config, opened)
        groups = {group: [(p, file) for p, file in zip(wanted, files) if p.group == group] for group in GROUPS}
        scores = scores_of(self.judge, subject, groups)
        draw_s = time.perf_counter() - begin
        shown = f"identity {scores['identity']:.3f}  scene accuracy {scores['scene accuracy']:.2f}  {draw_s:.1f} s"
        print(f"   {name:<17}{subject.id:<16}{shown}", flush=True)
        train_s = sum(record["stages_s"].values()) if record else 0.0
        about = {"variant": name, "seed": seed, "subject": subject.id, "class": subject.class_noun}
        return {**about, "prompt": wanted[0].prompt, "train_s": train_s, "draw_s": draw_s, "scores": scores}, groups


def main() -> None:
    """Train, draw, judge, and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="tiny or tiny_full, or a recipe file")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="A.B=C", help="settings for all variants")
    parser.add_argument("--subjects", type=int, help="only the first N demo subjects")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds")
    parser.add_argument("--images", type=int, default=6, help="pictures of the plain and of the class prompt")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-shape"), help="working folder, kept for resuming")
    parser.add_argument("--name", default="paper-shape", help="what the result files are called")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the three result files")
    options = parser.parse_args()
    begin = time.perf_counter()
    config = load(options.recipe, shared_settings(options))
    subjects = read_manifest(DEMO)[: options.subjects]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_models(FAMILIES[config.model.family], config.model).to(torch.device(device))
    judge = load_judge(device=device)
    rows, sheets = Bench(options, config, base, judge).measure(subjects)
    if not rows:
        raise SystemExit("every subject failed in some variant; see the messages above")
    about = {**circumstances(options, config, judge), "base": base_digest(base)[:12]}
    about["training (s)"] = round(sum(row["train_s"] for row in rows))
    about["this command (s)"] = round(time.perf_counter() - begin)
    write_results(options.results / f"{options.name}_{device}_{time.strftime('%Y%m')}", about, rows, subjects, sheets)


def circumstances(options: argparse.Namespace, config: RunConfig, judge: Judge) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    return {
        "machine": f"{platform.machine()} with {os.cpu_count()} CPUs, {judge.pair.model.device.type}",
        "torch": torch.__version__,
        "commit": commit(),
        "recipe": options.recipe,
        "overrides": " ".join(options.overrides) or "none",
        "steps": config.train.steps,
        "training seeds": " ".join(map(str, options.seeds)),
        "plain and class pictures": options.images,
        "encoders": f"{judge.identity.name}, {judge.pair.name}; DIV by {judge.names['distance']}",
        "sampling": f"{config.sample.steps} steps, guidance {config.sample.guidance:g}",
    }


if __name__ == "__main__":
    main()
