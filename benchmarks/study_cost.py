"""What a study costs beside its variants trained and scored one by one, and what halving keeps:
`python benchmarks/study_cost.py`.

24 variants (four rates, two ranks, three numbers of steps; constant rate) of 8 pilot subjects on the embedded base: the
whole study by `dbtrain.study`, and one variant of each number of steps, drawn by a seed, by the product's own path for
one subject at a time, on the same class images. Processor seconds of one thread; the cost of all variants one by one is
the mean of these, times variants. Then halving is played on the rows with the pilots in ten orders. Running again goes
on where it was stopped. Writes study-cost_cpu_<year and month>.{md,json}.
"""

import argparse
import json
import platform
import random
import time
from functools import partial
from pathlib import Path

import torch
from recipe_quality import PILOTS, pilot_manifest
from safetensors.torch import load_file

from dbtrain.bench import commit
from dbtrain.engines.world import start_world
from dbtrain.evaluate.judge import load_judge
from dbtrain.evaluate.protocol import Protocol, evaluate_finished
from dbtrain.results.publish import LORA_FILE
from dbtrain.study.findings import Goal, Row, cheapest, table, worse
from dbtrain.study.running import Study, folder_of, rounds
from dbtrain.study.variants import Design, Variant
from dbtrain.train import train_manifest
from dbtrain.training.session import Base, Watch, make_class_priors

RESULTS = Path(__file__).parent / "results"
VARY = (
    ("train.lr", ("1e-3", "2e-3", "4e-3", "8e-3")),
    ("lora.rank", ("8", "16")),
    ("train.steps", ("10", "20", "40")),
)
ORDERS = 10
"""Orders of the pilots in which halving is played."""


def spent(cache: Path, work) -> float:
    """Processor seconds of a piece of work; those of an earlier run where it was done then."""
    begin = time.process_time()
    work()
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(time.process_time() - begin))
    return json.loads(cache.read_text())


def one_by_one(folder: Path, manifest: Path, variant: Variant, store: str, protocol: Protocol) -> None:
    """A variant trained and scored as `dbtrain train` and `dbtrain evaluate` do it, subject by subject."""
    config = variant.config.replaced("prior.store", store)
    _, failed = train_manifest(manifest, config, folder, None, quiet=True)
    if failed:
        raise SystemExit(f"{variant.name}: {failed}")
    base = Base.load(config, start_world())
    judge = load_judge(protocol.identity, protocol.clip, base.world.device, protocol.distance)
    for subject in PILOTS:
        evaluate_finished(folder / "subjects" / subject, base.models, base.family, protocol, judge)


def apart(ours: Path, theirs: Path) -> float:
    """The largest difference of two adapters' matrices, relative to their size."""
    one, other = load_file(ours / LORA_FILE), load_file(theirs / LORA_FILE)
    return max(float((one[key] - value).norm() / value.norm()) for key, value in other.items() if value.norm() > 0)


def halved(rows: list[Row], variants: list[Variant], order: list[str], goal: Goal) -> tuple[set[str], int]:
    """The variants that halving drops with the pilots in an order, and the number of trainings that it makes."""
    dropped: set[str] = set()
    trained: set[tuple[str, str]] = set()
    for count in rounds(len(order)):
        left, pilots = [one for one in variants if one.name not in dropped], order[:count]
        known = [row for row in rows if row.subject in pilots and row.variant in {one.name for one in left}]
        trained |= {(row.variant, row.subject) for row in known}
        dropped |= worse(known, left, goal).keys()
    return dropped, len(trained)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study-cost"), help="working folder, kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, store = options.out.absolute(), str(options.out.absolute() / "priors")
    manifest, protocol = pilot_manifest(out / "pilots"), Protocol(images=1, class_images=2)
    words = ("sample.steps=10", "train.batch=2", "prior.images=8", "sample.images=1", "track.tensorboard=false",
             "engine.packed.size=16", "train.schedule=constant", f"prior.store={store}")  # fmt: skip
    design = Design("tiny", words, VARY, grid=True)
    variants = design.variants()
    make_class_priors({noun for noun, _, _ in PILOTS.values()}, variants[0].config, Path(store))
    study = Study(design, manifest, out / "study", protocol, Watch(quiet=True))
    rows: list[Row] = []
    whole = spent(out / "study.seconds", lambda: rows.extend(study.run()))
    if study.failed:
        raise SystemExit(str(study.failed))
    print(f"study: {whole:.0f} s", flush=True)
    alone, differ = [], []
    stream, by_steps = random.Random(0), [[one for one in variants if f"steps={n}" in one.title] for n in VARY[2][1]]
    for variant in map(stream.choice, by_steps):
        folder = out / "alone" / variant.name
        work = partial(one_by_one, folder, manifest, variant, store, protocol)
        alone.append(spent(out / f"{variant.name}.seconds", work))
        differ += [apart(folder_of(study.out, variant.name, s), folder / "subjects" / s) for s in PILOTS]
        print(f"{variant.title}: {alone[-1]:.0f} s, {max(differ):.1e} apart", flush=True)
    result = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "commit": commit(),
        "variants": len(variants),
        "subjects": len(PILOTS),
        "study_s": round(whole, 1),
        "alone_s": dict(zip(VARY[2][1], (round(seconds, 1) for seconds in alone))),
        "one_by_one_s": round(sum(alone) / len(alone) * len(variants), 1),
        "largest_difference": max(differ),
        **played(rows, variants),
        "rows": [{"variant": r.variant, "subject": r.subject, "cost_s": r.cost_s, **r.scores} for r in rows],
    }
    result["share"] = round(result["study_s"] / result["one_by_one_s"], 3)
    target = RESULTS / f"study-cost_cpu_{time.strftime('%Y%m')}"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [f"| {key} | {value} |" for key, value in result.items() if key not in ("rows", "orders")]
    heads = ["# A study beside its variants one by one", "", "| | |", "|---|---|"]
    target.with_suffix(".md").write_text("\n".join([*heads, *lines, ""]), encoding="utf-8")
    print("\n".join(lines))


def played(rows: list[Row], variants: list[Variant]) -> dict:
    """Halving with the pilots in ten orders: whether it keeps what the full grid calls best, and what it trains.

    Best: the most identity, and the cheapest variant that reaches nine tenths of that.
    """
    lines = table(rows, variants)
    top = max(lines, key=lambda line: line["dino"])
    goal = Goal(identity=0.9 * top["dino"])
    chosen, stream, orders = cheapest(lines, goal), random.Random(0), []
    for _ in range(ORDERS):
        dropped, trainings = halved(rows, variants, stream.sample(list(PILOTS), len(PILOTS)), goal)
        orders.append({"keeps the best identity": top.variant.name not in dropped,
                       "keeps the cheapest good one": chosen.variant.name not in dropped,
                       "dropped": len(dropped), "trainings": trainings})  # fmt: skip
    kept = {key: sum(order[key] for order in orders) for key in list(orders[0])[:2]}
    trainings = sum(order["trainings"] for order in orders) / ORDERS
    return {"best": top.variant.title, "cheapest good": chosen.variant.title, "orders": orders, **kept,
            "trainings of halving, of the grid": f"{trainings:.0f}, {len(rows)}"}  # fmt: skip


if __name__ == "__main__":
    main()
