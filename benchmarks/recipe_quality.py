"""What recipes of the embedded base buy, and what they cost: `python benchmarks/recipe_quality.py`.

Trains every recipe on every subject of one group, draws the same prompts with the same noise, and scores them.
Groups: `pilots`, on which recipes are chosen, and `demo`, the ten subjects on which the chosen ones are reported.
No drawing is in both, and none is of an art set that the base was trained on. Recipes alternate inside a seed.
Cost is processor time of one thread, training and its files alone, measured by short trainings of all recipes in turn;
class images are left out, because all recipes share them. Running again goes on where it was stopped. Writes
<name>_<device>_<year and month>.{md,json}.
"""

import argparse
import json
import platform
import shlex
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from measures import closed_share, mean_interval, spread
from paper_shape import draw, pictures, scores_of
from paper_shape_tables import BASE, GROUPS

from dbtrain.bench import commit
from dbtrain.evaluate.intervals import shown
from dbtrain.evaluate.judge import Judge, load_judge, read_images
from dbtrain.families import FAMILIES
from dbtrain.models.load import base_digest, load_models
from dbtrain.models.sampling import image_seed
from dbtrain.results.finished import finished_pipeline
from dbtrain.settings.recipes import load
from dbtrain.subjects.manifest import Subject, read_manifest
from dbtrain.tiny import DEMO
from dbtrain.train import train_manifest

sys.path.append(str(Path(__file__).resolve().parents[1] / "embedded"))

from dbtrain_embedded import demo, sprites, world
from dbtrain_embedded.world import Facts, article

RESULTS = Path(__file__).parent / "results"
PILOTS = {
    "dog-guide": ("dog", "fluent-emoji", "guide-dog"),
    "dog-flat": ("dog", "fluent-emoji-flat", "guide-dog"),
    "cat-black": ("cat", "fluent-emoji-flat", "black-cat"),
    "cat-face": ("cat", "fluent-emoji-flat", "cat-face"),
    "car-taxi": ("car", "fluent-emoji-flat", "taxi"),
    "car-racing": ("car", "fluent-emoji-flat", "racing-car"),
    "rabbit-white": ("rabbit", "fluent-emoji-flat", "rabbit"),
    "clock-alarm": ("clock", "fluent-emoji", "alarm-clock"),
}
"""Subject id -> (class noun, art set, emoji name): held-out art of none of the demo's subjects, mostly of classes with
many drawings, as the demo's are: where a class has two drawings, it is near its subject from the start."""
TRUE = "the class itself"
"""The row of pictures of the class that no model drew: other drawings, as the world shows them. A model that knows its
class has their PRES and DIV."""
SHORT, TURNS = (4, 16), 2
"""Steps of the two trainings by which the cost of a recipe is measured, and how often."""
SCORES = {
    "identity": "identity",
    "placed identity": "identity, placed",
    "scene accuracy": "scene accuracy",
    "class accuracy": "class accuracy",
    "placed clip_t_plain": "CLIP-T, placed",
    "pres": "PRES, lower is better",
    "drift": "PRES less the base's",
    "div_identity": "DIV (identity)",
}


def pilot_manifest(folder: Path) -> Path:
    """A manifest of the pilot subjects, each with five pictures drawn as those of the demo's subjects are."""
    lines = ["subject,class,images"]
    for number, (subject, (noun, vendor, name)) in enumerate(PILOTS.items()):
        sprite = demo.find(noun, vendor, name)
        (folder / subject).mkdir(parents=True, exist_ok=True)
        for i, place in enumerate(demo.SCENES):
            picture = world.render(Facts(noun, sprite, place), world.stream(60_000 + 100 * number + i), "heldout")
            picture.save(folder / subject / f"{i:02d}.png")
        lines.append(f"{subject},{noun},{subject}")
    (folder / "subjects.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "subjects.csv"


def true_scores(judge: Judge, subject: Subject, count: int = 16) -> dict[str, float]:
    """PRES and DIV of `count` pictures of the subject's class: the drawings that the base was trained on, by turns."""
    drawings = sprites.of_noun(subject.class_noun, "train")
    shown = [world.render(Facts(subject.class_noun, drawings[i % len(drawings)]), world.stream(70_000 + i))
             for i in range(count)]  # fmt: skip
    own, photos = judge.identity.images(shown), judge.identity.images(read_images(subject.images))
    return {"pres": float((own @ photos.T).mean()), "div_identity": float(spread(own, torch.zeros(count)).mean())}


def train(options, folder: Path, words: list[str], manifest: Path, seed: int) -> dict[str, dict]:
    """The records by subject of a recipe, trained now or before."""
    shared = [f"prior.store={options.out / 'priors'}", "sample.images=0", "track.tensorboard=false", f"seed={seed}"]
    records, failed = train_manifest(manifest, load(words[0], [*shared, *words[1:]]), folder, None, quiet=True)
    if failed:
        raise SystemExit(f"{folder.name}: {failed}")
    return {record["subject"]: record for record in records}


def costs(options, recipes: dict[str, list[str]], manifest: Path) -> dict[str, float]:
    """Processor seconds of each recipe on the whole manifest: what a step costs, times its steps, and all else once.

    Measured by short trainings of all recipes in turn, so that other work on the machine meets all of them alike.
    """
    spent: dict[str, list[float]] = {name: [] for name in recipes}
    name, words = next(iter(recipes.items()))
    short_cost(options, f"{name} warm", words, manifest, 1)  # the first training of a process also warms it up
    for turn in range(TURNS):
        for name, words in recipes.items():
            short, long = (short_cost(options, f"{name} {turn}", words, manifest, steps) for steps in SHORT)
            more = load(words[0], words[1:]).train.steps - SHORT[0]
            spent[name].append(short + more * (long - short) / (SHORT[1] - SHORT[0]))
    return {name: statistics.fmean(turns) for name, turns in spent.items()}


def short_cost(options, name: str, words: list[str], manifest: Path, steps: int) -> float:
    """Processor seconds of a training of so few steps; those of an earlier run where it was made then."""
    folder = options.out / "costs" / f"{name} {steps}"
    cost = folder / "cost.json"
    if not cost.exists():
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.process_time()
        train(options, folder, [*words, f"train.steps={steps}"], manifest, options.seeds[0])
        cost.write_text(json.dumps(time.process_time() - begin))
    return json.loads(cost.read_text())


def measure(options, recipes: dict[str, list[str]], manifest: Path) -> list[dict]:
    """A row for each recipe, seed and subject, those of the class itself and of the base model among them."""
    subjects, config = read_manifest(manifest), load("tiny", [f"sample.steps={options.sampling}"])
    base = load_models(FAMILIES["sd"], config.model).to(torch.device("cpu"))
    judge, first = load_judge(), options.seeds[0]
    rows = [{"recipe": TRUE, "seed": first, "subject": one.id, "scores": true_scores(judge, one)} for one in subjects]
    warm_priors(options, manifest)
    for seed in options.seeds:
        before: dict[str, float] = {}  # subject -> PRES of the base model's pictures of the class
        for name, words in {BASE: [], **recipes}.items():
            if name in options.once and seed != first:
                continue
            place = options.out / f"seed-{seed}" / name
            records = train(options, place, words, manifest, seed) if words else {}
            begin, scored = time.process_time(), []
            for subject in subjects:
                record = records.get(subject.id)
                noun = subject.class_noun
                named = f"{record['identifier']} {noun}" if record else article(noun)
                wanted = pictures(named, subject, options.images, drift=record is not None)
                wanted = [p for p in wanted if p.group != "placed" or p.number < options.placed]
                seeds = [image_seed("paper-shape", seed, subject.id, p.place, p.number) for p in wanted]
                folder = place / "subjects" / subject.id if record else None
                opened = partial(finished_pipeline, folder, FAMILIES["sd"], base, config)
                cache = options.out / "pictures" / f"seed-{seed}" / name / subject.id
                files = draw(cache, record["run"] if record else base_digest(base), wanted, seeds, config, opened)
                groups = {group: [(p, f) for p, f in zip(wanted, files) if p.group == group] for group in GROUPS}
                scores = scores_of(judge, subject, groups)
                before.setdefault(subject.id, scores["identity"])
                if record:
                    scores["drift"] = scores["pres"] - before[subject.id]
                scored.append({"recipe": name, "seed": seed, "subject": subject.id, "scores": scores})
            rows += scored
            told = "  ".join(
                f"{title} {statistics.fmean(row['scores'][key] for row in scored):.3f}"
                for key, title in SCORES.items()
                if key in scored[0]["scores"]
            )
            print(f"seed {seed} {name}: {told}; {time.process_time() - begin:.0f} s of drawing and scoring", flush=True)
    return rows


def warm_priors(options, manifest: Path) -> None:
    """Draw the class images that all recipes share, by a training of one step."""
    words = ["train.steps=1", "engine.packed.size=1", "sample.images=0", "track.tensorboard=false"]
    words += [f"prior.store={options.out / 'priors'}"]
    train_manifest(manifest, load("tiny_packed", words), options.out / "warm", None, quiet=True)


def by_subject(rows: list[dict], recipe: str, score: str) -> list[float]:
    """One value a subject, the mean over seeds."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["recipe"] == recipe and score in row["scores"]:
            values.setdefault(row["subject"], []).append(row["scores"][score])
    return [statistics.fmean(values[subject]) for subject in sorted(values)]


def summary(rows: list[dict], cost: dict[str, float]) -> list[dict]:
    """Cost and scores of each recipe, with intervals over subjects: the class itself, the base model, then by cost.

    share: of the most expensive recipe's cost. closed: how much of the identity gap to the photos.
    """
    names, cost = list(dict.fromkeys(row["recipe"] for row in rows)), {TRUE: 0.0, BASE: 0.0, **cost}
    names.sort(key=lambda name: (name not in (TRUE, BASE), -cost[name]))
    dearest = max(cost, key=cost.__getitem__)
    base, real, found = by_subject(rows, BASE, "identity"), by_subject(rows, BASE, "real_identity"), []
    for name in names:
        scores = {score: mean_interval(values).row() for score in SCORES if (values := by_subject(rows, name, score))}
        trained = name not in (TRUE, BASE)
        closed = closed_share(base, by_subject(rows, name, "identity"), real).row() if trained else None
        share = round(cost[name] / cost[dearest], 3)
        more = {score: mean_interval([own - its for own, its in zip(by_subject(rows, name, score), others)]).row()
                for score in SCORES if trained and name != dearest
                for others in [by_subject(rows, dearest, score)]}  # fmt: skip
        found.append({"recipe": name, "cpu_s": round(cost[name], 1), "share": share, "closed": closed, **scores,
                      "more than the dearest": more})  # fmt: skip
    return found


def table(found: list[dict]) -> list[str]:
    """The summary as a table."""
    lines = ["| recipe | CPU-s | share | gap closed | " + " | ".join(SCORES.values()) + " |"]
    lines.append("|---" * (len(SCORES) + 4) + "|")
    for one in found:
        cells = [shown(one[key]) if one.get(key) else "" for key in ("closed", *SCORES)]
        lines.append(f"| {one['recipe']} | {one['cpu_s']:.0f} | {one['share']:.3f} | " + " | ".join(cells) + " |")
    heads = "| more than the dearest, subject by subject | " + " | ".join(SCORES.values()) + " |"
    lines += ["", heads, "|---" * (len(SCORES) + 1) + "|"]
    for one in found:
        if more := one["more than the dearest"]:
            lines.append(f"| {one['recipe']} | " + " | ".join(shown(more[score]) for score in SCORES) + " |")
    return lines


def main() -> None:
    """Train, draw, score, and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=("pilots", "demo"), default="pilots")
    parser.add_argument("--recipe", action="append", required=True, metavar="NAME: RECIPE A.B=C ...")
    parser.add_argument("--once", nargs="*", default=[], metavar="NAME", help="recipes with the first seed alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds")
    parser.add_argument("--images", type=int, default=8, help="pictures of the plain and of the class prompt")
    parser.add_argument("--placed", type=int, default=2, choices=(1, 2), help="pictures of each of the fifteen places")
    parser.add_argument("--sampling", type=int, default=25, help="sampling steps of a picture")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe-quality"), help="working folder, kept")
    parser.add_argument("--name", help="what the result files are called; nothing is written without a name")
    options = parser.parse_args()
    recipes = {line.partition(":")[0].strip(): shlex.split(line.partition(":")[2]) for line in options.recipe}
    manifest = DEMO if options.group == "demo" else pilot_manifest(options.out / "pilots")
    rows = measure(options, recipes, manifest)
    cost = costs(options, recipes, manifest)
    found = summary(rows, cost)
    lines = table(found)
    print("\n".join(lines))
    if options.name:
        target = RESULTS / f"{options.name}_cpu_{time.strftime('%Y%m')}"
        about = {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "commit": commit(),
            "group": options.group,
            "recipes": {name: shlex.join(words) for name, words in recipes.items()},
            "seeds": options.seeds,
            "with the first seed alone": options.once,
            "images": options.images,
            "placed": options.placed,
            "sampling": options.sampling,
        }
        whole = {**about, "summary": found, "rows": rows}
        target.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        heads = [f"- {key}: {value}" for key, value in about.items() if key != "recipes"]
        heads += [f"- {name}: `{words}`" for name, words in about["recipes"].items()]
        target.with_suffix(".md").write_text("\n".join(["# Recipes", "", *heads, "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
