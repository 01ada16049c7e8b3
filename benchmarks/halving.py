"""What halving keeps of what a whole study finds best: `python benchmarks/halving.py`.

Eight variants (four rates, two numbers of steps) of eight pilot subjects on the embedded base, all trained and
scored once by `dbtrain.study`. Halving looks at four pilots first and then at all, and its outcome depends only on
which four come first. So it is played on the finished rows with the pilots in ten seeded orders, and with each of the
70 choices of the first four. Running again goes on where it was stopped. Writes halving_cpu_<year and month>.{md,json}.
"""

import argparse
import json
import platform
import random
import time
from itertools import combinations
from pathlib import Path

import torch
from recipe_quality import PILOTS, pilot_manifest

from dbtrain.bench import commit
from dbtrain.evaluate.protocol import Protocol
from dbtrain.study.findings import Goal, Line, Row, cheapest, table, worse
from dbtrain.study.running import FEWEST, Study, rounds
from dbtrain.study.variants import Design, Variant
from dbtrain.training.session import Watch

RESULTS = Path(__file__).parent / "results"
VARY = (("train.lr", ("1e-3", "3e-3", "6e-3", "1.2e-2")), ("train.steps", ("20", "40")))
WORDS = ("train.schedule=constant", "prior.images=8", "sample.images=2", "sample.steps=10", "track.tensorboard=false",
         "engine.packed.size=16")  # fmt: skip
ORDERS = 10
"""Seeded orders of the pilots in which halving is played."""
GOOD = 0.9
"""Share of the most identity that a recipe must reach, for the cheapest that is good enough."""


def halved(rows: list[Row], variants: list[Variant], order: list[str], goal: Goal) -> tuple[list[Variant], int]:
    """The variants that halving keeps with the pilots in an order, and the rows that it trains."""
    left, trained = list(variants), set[tuple[str, str]]()
    for count in rounds(len(order)):
        names = {one.name for one in left}
        known = [row for row in rows if row.subject in order[:count] and row.variant in names]
        trained |= {(row.variant, row.subject) for row in known}
        dropped = worse(known, left, goal)
        left = [one for one in left if one.name not in dropped]
    return left, len(trained)


def play(rows: list[Row], variants: list[Variant], order: list[str], best: Line, goal: Goal) -> dict:
    """What halving keeps with the pilots in one order, beside the whole grid."""
    left, trained = halved(rows, variants, order, goal)
    names = {one.name for one in left}
    found = cheapest(table([row for row in rows if row.variant in names], left), goal)
    whole = cheapest(table(rows, variants), goal)
    same = found is not None and whole is not None and found.variant.name == whole.variant.name
    return {"first": order[:FEWEST], "keeps the best": best.variant.name in names, "chooses the same": same,
            "left": len(left), "trained": trained}  # fmt: skip


def main() -> None:
    """Train and score what is missing, play halving, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/halving"), help="working folder, kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, begin = options.out.absolute(), time.process_time()
    design = Design("tiny_packed", WORDS, VARY, grid=True)
    study = Study(design, pilot_manifest(out / "pilots"), out / "study", Protocol(class_images=4), Watch())
    rows, variants = study.run(), design.variants()
    if study.failed:
        raise SystemExit(str(study.failed))
    lines = table(rows, variants)
    best = max(lines, key=lambda line: line["dino"])
    goal, pilots, stream = Goal(identity=GOOD * best["dino"]), list(PILOTS), random.Random(0)
    orders = [stream.sample(pilots, len(pilots)) for _ in range(ORDERS)]
    sets = [[*first, *(one for one in pilots if one not in first)] for first in combinations(pilots, FEWEST)]
    played = {"orders": [play(rows, variants, order, best, goal) for order in orders],
              "sets": [play(rows, variants, order, best, goal) for order in sets]}  # fmt: skip
    result = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "commit": commit(),
        "cpu_s": round(time.process_time() - begin, 1),
        "vary": dict(VARY),
        "words": WORDS,
        "best": best.variant.title,
        "rows": len(rows),
        **played,
        "scores": [{"variant": r.variant, "subject": r.subject, "cost_s": r.cost_s, **r.scores} for r in rows],
    }
    target = RESULTS / f"halving_cpu_{time.strftime('%Y%m')}"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(report(result, lines), encoding="utf-8")
    print(report(result, lines))


def report(result: dict, lines: list[Line]) -> str:
    """The result file for people."""
    text = [
        "# What halving keeps of what a whole study finds best",
        "",
        f"{result['machine']}; commit {result['commit']}. {len(lines)} variants of {len(PILOTS)} pilots, trained once.",
        f"The best has the most identity: {result['best']}. Chosen is the cheapest with {GOOD:.0%} of it.",
        "",
        "| pilots in | keeps the best | chooses what the grid chooses | variants left | rows trained |",
        "|---|---|---|---|---|",
    ]
    for key, title in (("orders", f"{ORDERS} seeded orders"), ("sets", "each choice of the first four")):
        games = result[key]
        counts = [sum(game[name] for game in games) for name in ("keeps the best", "chooses the same")]
        shares = [f"{count} of {len(games)}" for count in counts]
        means = [f"{sum(game[name] for game in games) / len(games):.1f}" for name in ("left", "trained")]
        text.append(f"| {title} | " + " | ".join([*shares, *means]) + " |")
    text += ["", "| variant | device-s | DINO | PRES |", "|---|---|---|---|"]
    text += [f"| {one.variant.title} | {one.cost:.2f} | {one['dino']:.3f} | {one['pres']:.3f} |" for one in lines]
    return "\n".join([*text, ""])


if __name__ == "__main__":
    main()
