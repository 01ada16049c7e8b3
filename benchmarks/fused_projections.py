"""What `engine.fused_projections`, `engine.fused_pointwise` and `engine.channels_last` save: kernels of a step, and
modelled milliseconds.

    python benchmarks/fused_projections.py [--out benchmarks/results/fused-projections_cpu_202611]

No GPU is used. Each architecture is counted as it is plain; with adapted layers that read one input together; with
gates, norms and rotary embeddings fused as well; and, where it has convolutions, with their channels last.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dbtrain.bench import commit  # noqa: E402
from dbtrain.bench.cards import CARDS  # noqa: E402
from dbtrain.bench.roofline import architectures, count, modelled, targets_of  # noqa: E402

PACKS = {"sd15": 8, "sdxl": 2, "flux1": 1, "zimage": 1}
"""Subjects of a pack, by architecture; one photo and one prior each, rank 16, the layers of the shipped recipe."""
CARD = "H200"
FORMS = {
    "plain": (), "+ projections": ("fused",), "+ gates, norms, rotary": ("fused", "pointwise"),
    "+ channels last": ("fused", "pointwise", "last"),
}  # fmt: skip
"""fused_projections, fused_pointwise and channels_last, by name."""


def row(name: str, form: str) -> dict[str, Any]:
    """Counts of a step and its modelled time."""
    family, shape = architectures()[name]
    forms = {one: one in FORMS[form] for one in ("fused", "pointwise", "last")}
    counts = count(name, family, shape, PACKS[name], targets_of(family), **forms)
    found = modelled(counts, CARDS[CARD])
    cudnn = modelled(counts, CARDS[CARD], "cudnn")["a_subject_ms"]
    kept = {key: found[key] for key in ("kernels", "gb", "tflop", "floor_ms", "modelled_ms", "a_subject_ms")}
    parts = {part: (*counts.parts[part].sums[:2], found["parts"][part]["ms"]) for part in counts.parts}
    return {"model": name, "subjects": PACKS[name], "layers": counts.layers, "form": form, **kept, "cudnn_ms": cudnn,
            "parts": parts}  # fmt: skip


def launches(one: dict[str, Any]) -> int:
    """Operators that compute or copy, ours as the kernels that they start; copies of layouts, which cuDNN makes inside
    a convolution, are left out."""
    return one["kernels"] - one["parts"].get("layout of convolutions", (0,))[0]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = "| model | subjects | adapted layers | form | launches | GB moved | modelled ms | a subject, ms "
    heads += "| with cuDNN's attention |"
    lines = [heads, "|" + "---|" * heads.count(" | ") + "---|"]
    for one in rows:
        lines.append(
            f"| {one['model']} | {one['subjects']} | {one['layers']} | {one['form']} "
            f"| {launches(one):,} | {one['gb']:,.0f} | {one['modelled_ms']:,.1f} | {one['a_subject_ms']:,.1f} "
            f"| {one['cudnn_ms']:,.1f} |"
        )
    return "\n".join(lines)


def others(out: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of other models in an earlier result of the same commit, so that models may be counted in turns."""
    file, counted = out.with_suffix(".json"), {one["model"] for one in rows}
    before = json.loads(file.read_text("utf-8")) if file.exists() else {"commit": None}
    return [one for one in before["rows"] if one["model"] not in counted] if before["commit"] == commit() else []


def by_parts(rows: list[dict[str, Any]]) -> str:
    """Markdown: modelled milliseconds of a step by part, of the last form."""
    last = [*{one["model"]: one for one in rows}.values()]
    names = sorted({part for one in last for part in one["parts"]})
    lines = [f"| model | subjects | {' | '.join(names)} | step |", "|" + "---|" * (len(names) + 3)]
    for one in last:
        spent = (f"{one['parts'].get(part, (0, 0, 0))[2]:,.1f}" for part in names)
        lines.append(f"| {one['model']} | {one['subjects']} | {' | '.join(spent)} | {one['modelled_ms']:,.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    parser.add_argument("--models", nargs="+", choices=list(PACKS), default=list(PACKS))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        for form in FORMS if "layout of convolutions" in row(name, "plain")["parts"] else [*FORMS][:-1]:
            rows.append(row(name, form))
            shown = {key: value for key, value in rows[-1].items() if key != "parts"}
            print(shown, file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.out:
        rows = sorted([*others(arguments.out, rows), *rows], key=lambda one: [*PACKS].index(one["model"]))
        made = {"command": f"python benchmarks/fused_projections.py --out {arguments.out}", "commit": commit()}
        made |= {"torch": torch.__version__, "python": platform.python_version(), "card": CARD}
        record = json.dumps({**made, "rows": rows}, indent=1) + "\n"
        arguments.out.with_suffix(".json").write_text(record, "utf-8")
        text = f"""# Fused projections, gates, norms and embeddings: counted and modelled, no GPU used

Launches are exact; an operator of PyTorch counts as one kernel, and a GroupNorm as its three forward and four backward.
Milliseconds are the roofline's model of an {CARD}, which no GPU has confirmed, with FlashAttention 2; the last column
has an attention 1.4 times as fast. bf16, rank 16, latents and captions cached, nothing recomputed.

{table(rows)}

Where the modelled milliseconds of a step are, in the last form:

{by_parts(rows)}

Command: `{made["command"]}`. torch {made["torch"]}, Python {made["python"]}, commit {made["commit"]}.
"""
        arguments.out.with_suffix(".md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
