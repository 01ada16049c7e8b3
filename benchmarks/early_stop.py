"""What `train.stop` buys on the embedded base: `python benchmarks/early_stop.py`.

Four pilot subjects of five photos, trained by `tiny_packed` with its falling rate and with a constant one, each with
`train.stop.metric=loss` and without; with the constant rate also scored on the way. The costs are seconds of the
machine, shared out by steps (`dbtrain study`). Running again goes on where it was stopped. Writes
early-stop_cpu_<year and month>.{md,json}.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from recipe_quality import PILOTS, pilot_manifest

from dbtrain.bench import commit
from dbtrain.evaluate.protocol import Protocol
from dbtrain.results.record import finished_record
from dbtrain.study.findings import Line, cell, table
from dbtrain.study.running import Study, folder_of
from dbtrain.study.variants import Design
from dbtrain.training.session import Watch

RESULTS = Path(__file__).parent / "results"
SUBJECTS = ("dog-guide", "dog-flat", "cat-black", "cat-face")
WORDS = ("prior.images=16", "sample.images=2", "track.tensorboard=false", "engine.packed.size=4")
STOP = ("train.stop.metric", ("loss",))
DESIGNS = {
    "falling": ((), (STOP,)),
    "constant": (("train.schedule=constant",), (("train.steps", ("60", "120", "180")), STOP)),
}
"""For each rate: the words of its recipe, and what is varied, one at a time."""


def rows_of(study: Study, rate: str) -> tuple[list[dict], list[Line]]:
    """A row for each variant and subject, and the table of the variants."""
    rows, found = study.run(), []
    if study.failed:
        raise SystemExit(str(study.failed))
    for row in rows:
        record = finished_record(folder_of(study.out, row.variant, row.subject))
        found.append({"rate": rate, "variant": row.variant, "subject": row.subject, "steps": record["steps"],
                      "cost_s": row.cost_s, "watching_s": record["stages_s"].get("stop", 0.0),
                      **row.scores, "stop": record.get("stop")})  # fmt: skip
    return found, table(rows, study.design.variants())


def main() -> None:
    """Train and score what is missing, and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/early-stop"), help="working folder, kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out.absolute()
    manifest = pilot_manifest(out / "pilots")
    kept = [line for line in manifest.read_text("utf-8").splitlines() if line.split(",")[0] in ("subject", *SUBJECTS)]
    manifest.write_text("\n".join(kept) + "\n", encoding="utf-8")
    rows, tables = [], {}
    for rate, (words, vary) in DESIGNS.items():
        design = Design("tiny_packed", (*WORDS, *words, f"prior.store={out / 'priors'}"), vary)
        study = Study(design, manifest, out / rate, Protocol(class_images=4), Watch())
        found, tables[rate] = rows_of(study, rate)
        rows += found
    result = {"machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}", "commit": commit(),
              "words": WORDS, "pilots": {name: PILOTS[name] for name in SUBJECTS}, "rows": rows}  # fmt: skip
    target = RESULTS / f"early-stop_cpu_{time.strftime('%Y%m')}"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(text := report(result, tables), encoding="utf-8")
    print(text)


def report(result: dict, tables: dict[str, list[Line]]) -> str:
    """The result file for people."""
    lines = ["# What `train.stop` buys on the embedded base", "",
             f"{result['machine']}; commit {result['commit']}. Means over {len(SUBJECTS)} pilots, with intervals.", "",
             "| rate | variant | steps | device-s | of them watching | DINO | CLIP-T-PLAIN | PRES |",
             "|---" * 8 + "|"]  # fmt: skip
    for rate, found in tables.items():
        for line in found:
            own = [row for row in result["rows"] if (row["rate"], row["variant"]) == (rate, line.variant.name)]
            steps, watching = (sum(row[key] for row in own) / len(own) for key in ("steps", "watching_s"))
            shown = (cell(line.means[name]) for name in ("dino", "clip_t_plain", "pres"))
            cells = [f"{steps:.0f}", f"{line.cost:.1f}", f"{watching:.1f}", *shown]
            lines.append(f"| {rate} | {line.variant.title} | " + " | ".join(cells) + " |")
    lines += ["", "| rate | subject | ended after | best loss after | DINO stopped | DINO after all steps |",
              "|---" * 6 + "|"]  # fmt: skip
    for row in (row for row in result["rows"] if row["stop"]):
        whole = next(one for one in result["rows"] if (one["rate"], one["variant"], one["subject"]) ==
                     (row["rate"], "recipe", row["subject"]))  # fmt: skip
        lines.append(f"| {row['rate']} | {row['subject']} | {row['steps']} | {row['stop']['best_step']} "
                     f"| {row['dino']:.3f} | {whole['dino']:.3f} |")  # fmt: skip
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
