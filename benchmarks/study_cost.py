"""What a study costs beside its rows made one by one: `python benchmarks/study_cost.py`.

24 variants (four rates, two ranks, three numbers of steps) of pilot subjects on the embedded base. The study trains and
scores them as `dbtrain study` does, on a share of the eight pilots: each pilot adds the same rows to the packs. One by
one, rows of the same pilots are trained by `dbtrain train` and scored by `dbtrain evaluate`, each variant a run of its
own; some rows are made, spread over the variants, before and after the study. Class images are there for both, and so
are the base model's pictures for the rows that are made one by one. Counted is processor time of one thread, loading
and files included, imports and the first warm-up not. Writes study-cost_cpu_<year and month>.{md,json}.
"""

import argparse
import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from recipe_quality import PILOTS, pilot_manifest

from dbtrain.bench import commit
from dbtrain.evaluate.judge import load_judge
from dbtrain.evaluate.protocol import Protocol, evaluate_finished
from dbtrain.families import FAMILIES
from dbtrain.results.finished import load_all
from dbtrain.settings.recipes import load
from dbtrain.study.running import Study
from dbtrain.study.variants import Design, Variant
from dbtrain.train import train_manifest
from dbtrain.training.session import Watch

RESULTS = Path(__file__).parent / "results"
RATES, RANKS = ("1e-3", "2e-3", "4e-3", "8e-3"), ("8", "16")
WORDS = ("train.schedule=constant", "track.tensorboard=false")
PROTOCOL = Protocol()


class Timed(Study):
    """A study that notes the processor seconds of its scoring."""

    scoring_s = 0.0

    def score(self, *given):
        """The rows' scores."""
        begin = time.process_time()
        rows = super().score(*given)
        self.scoring_s += time.process_time() - begin
        return rows


def spent(call: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def alone(options, variant: Variant, subject: str, manifest: Path) -> dict:
    """Processor seconds of one row by itself: of training, and of scoring."""
    out = options.out / "alone" / variant.name
    shutil.rmtree(out, ignore_errors=True)
    config = load("tiny", [*options.words, *variant.words, f"prior.store={options.out / 'priors'}"])
    folder, how = out / "subjects" / subject, replace(PROTOCOL, base_pictures=options.out / "base")
    training = spent(lambda: train_manifest(manifest, config, out, [subject], quiet=True))

    def score() -> None:
        evaluate_finished(folder, load_all(config), FAMILIES["sd"], how, load_judge())

    return {"variant": variant.title, "subject": subject, "steps": config.train.steps,
            "train_s": round(training, 2), "score_s": round(spent(score), 2)}  # fmt: skip


def main() -> None:
    """Make rows alone, the study, and rows alone again; write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pilots", type=int, default=2, help="of the eight, from the first")
    parser.add_argument("--steps", nargs=3, default=["60", "120", "240"], help="the three numbers of steps")
    parser.add_argument("--alone", type=int, default=3, help="rows made one by one on either side of the study")
    parser.add_argument("--sampling", type=int, default=25, help="sampling steps of a picture")
    parser.add_argument("--out", type=Path, default=Path("runs/study-cost"), help="working folder, made anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out = options.out.absolute()
    options.words = (*WORDS, f"sample.steps={options.sampling}")
    for name in ("study", "alone"):
        shutil.rmtree(options.out / name, ignore_errors=True)
    whole = pilot_manifest(options.out / "pilots")
    manifest, chosen = whole.with_name("some.csv"), list(PILOTS)[:: len(PILOTS) // options.pilots][: options.pilots]
    lines = whole.read_text("utf-8").splitlines()
    manifest.write_text("\n".join([lines[0], *(one for one in lines if one.split(",")[0] in chosen)]) + "\n", "utf-8")
    vary = (("train.lr", RATES), ("lora.rank", RANKS), ("train.steps", tuple(options.steps)))
    design = Design("tiny_packed", (*options.words, f"prior.store={options.out / 'priors'}"), vary, grid=True)
    variants = design.variants()
    warm = replace(variants[0], changes=(*variants[0].changes, ("train.steps", "1")), name="warm")
    for subject in chosen:
        alone(options, warm, subject, manifest)
    # Rows spread over variants and pilots, as many of each number of steps.
    rows = [(variants[(7 * i + i // 3) % len(variants)], chosen[i % len(chosen)]) for i in range(2 * options.alone)]
    before = [alone(options, *row, manifest) for row in rows[: options.alone]]
    study = Timed(design, manifest, options.out / "study", PROTOCOL, Watch(True))
    study_s = spent(study.run)
    if study.failed:
        raise SystemExit(str(study.failed))
    after = [alone(options, *row, manifest) for row in rows[options.alone :]]
    report(options, study_s, study.scoring_s, [*before, *after], len(variants), chosen)


def report(options, study_s: float, scoring_s: float, rows: list[dict], variants: int, chosen: list[str]) -> None:
    """Print and write what came out."""
    count = variants * len(chosen)
    steps = [sum(int(each) for each in options.steps), max(int(each) for each in options.steps)]
    per_step = sum(row["train_s"] for row in rows) / sum(row["steps"] for row in rows)
    train_s, score_s = per_step * steps[0] / len(options.steps), sum(row["score_s"] for row in rows) / len(rows)
    arms = {
        "one by one": {"training": train_s, "scoring": score_s},
        "study": {"training": (study_s - scoring_s) / count, "scoring": scoring_s / count},
    }
    ratio = sum(arms["study"].values()) / sum(arms["one by one"].values())
    result = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "commit": commit(),
        "variants": variants,
        "pilots": chosen,
        "steps": options.steps,
        "sampling": options.sampling,
        "seconds a row": {arm: {key: round(value, 2) for key, value in parts.items()} for arm, parts in arms.items()},
        "ratio": round(ratio, 3),
        "alone": rows,
    }
    lines = [f"| {arm} | {parts['training']:.2f} | {parts['scoring']:.2f} | {sum(parts.values()):.2f} |"
             for arm, parts in arms.items()]  # fmt: skip
    about = (
        f"{result['machine']}; commit {result['commit']}. {variants} variants ({len(RATES)} rates, {len(RANKS)} ranks, "
        f"{' / '.join(options.steps)} steps at a constant rate) of {len(chosen)} of the eight pilots: {count} rows. "
        f"{len(rows)} rows were made one by one, half of them before the study and half after it; their training is "
        f"taken by the step. A row has ten pictures of {options.sampling} sampling steps."
    )
    found = f"The study costs {ratio:.2f} of them. Its {steps[0]} steps of a rate and rank take {steps[1]}."
    heads = ["| processor seconds a row | training | scoring | together |", "|---|---|---|---|"]
    text = ["# What a study costs beside its rows made one by one", "", about, "", *heads, *lines, "", found, ""]
    print("\n".join(text))
    target = RESULTS / f"study-cost_cpu_{time.strftime('%Y%m')}"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
