"""Tables, findings and the contact sheet of `paper_shape.py`: pure functions of its rows."""

import json
import statistics
from pathlib import Path

from measures import closed_share, mean_interval
from PIL import Image

from dbtrain.evaluate.intervals import Interval, shown
from dbtrain.evaluate.judge import read_images
from dbtrain.results.sheets import grid
from dbtrain.values import Subject

BASE = "base model"
GROUPS = ("plain", "placed", "class")
POSITIVE = 0.0
"""A goal that only asks for the sign."""


def column(rows: list[dict], variant: str, score: str) -> list[float]:
    """One value a subject, the mean over seeds, in a fixed order of subjects."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["variant"] == variant and score in row["scores"]:
            values.setdefault(row["subject"], []).append(row["scores"][score])
    return [statistics.fmean(values[subject]) for subject in sorted(values)]


def differences(rows: list[dict], score: str, first: str, second: str) -> list[float]:
    """First minus second, subject by subject."""
    return [a - b for a, b in zip(column(rows, first, score), column(rows, second, score), strict=True)]


def findings(rows: list[dict]) -> list[dict]:
    """What the paper and the plan lead one to expect, what was measured, and whether it holds."""
    div = "div_lpips" if "div_lpips" in rows[-1]["scores"] else "div_patches"
    div_name = COLUMNS[div]
    base, real = column(rows, BASE, "identity"), column(rows, BASE, "real_identity")
    found = []
    for name, goal in (("with prior", 0.7), ("without prior", None)):
        share = closed_share(base, column(rows, name, "identity"), real)
        found.append(_finding(f"share of the identity gap closed, {name}", share, goal))
    scenes = mean_interval(column(rows, "with prior", "scene accuracy"))
    found.append(_finding("scene accuracy of recontextualized prompts, with prior", scenes, 0.8))
    for what, score, first, second in (
        ("Table 3: PRES, without minus with prior", "pres", "without prior", "with prior"),
        (f"Table 3: {div_name} in scenes, with minus without prior", f"placed {div}", "with prior", "without prior"),
        (f"Table 3: {div_name} of the plain prompt, with minus without", div, "with prior", "without prior"),
        *(
            (f"Table 4, {prior}: {named}, right class noun minus {noun}", score, prior, f"{noun} class noun{tail}")
            for prior, tail in (("without prior", ", no prior"), ("with prior", ""))
            for named, score in (("identity", "identity"), ("identity in scenes", "placed identity"))
            for noun in ("no", "wrong")
        ),
    ):
        found.append(_finding(what, mean_interval(differences(rows, score, first, second)), POSITIVE))
    cost = mean_interval(differences(rows, "identity", "without prior", "with prior"))
    return [*found, _finding("Table 3: what prior preservation costs in identity", cost, None)]


def _finding(what: str, interval: Interval, goal: float | None) -> dict:
    """A finding as JSON holds it, with its verdict: a sign is met or missed only where the whole interval has it."""
    if goal is None:
        verdict = ""
    elif goal == POSITIVE:
        verdict = "met" if interval.low > 0 else "missed" if interval.high < 0 else "not shown"
    else:
        verdict = "met" if interval.value >= goal else "missed"
    return {"what": what, **interval.row("subjects"), "goal": goal, "verdict": verdict}


COLUMNS = {
    "identity": "identity",
    "clip_i": "CLIP-I",
    "placed identity": "identity, placed",
    "placed clip_t": "CLIP-T, placed",
    "placed clip_t_plain": "CLIP-T, placed, no identifier",
    "scene accuracy": "scene accuracy",
    "class accuracy": "class accuracy",
    "pres": "PRES (lower is better)",
    "placed div_patches": "DIV (patch distance), placed",
    "div_patches": "DIV (patch distance)",
    "div_identity": "DIV (1 - identity cosine)",
    "div_lpips": "DIV (LPIPS)",
    "drift class accuracy": "class accuracy after tuning",
}


DETAILS = (("with prior", "pres"), ("without prior", "pres"), ("with prior", "scene accuracy"))
"""Further columns of the table by subject: variant, score."""

NOTES = """\
Means over subjects of each subject's mean (macro). Identity and CLIP-I: `a photo of [V] <class>` against all of the
subject's photos. Placed: two pictures in each place of the world. The base row draws `a photo of a <class>`; its PRES
equals its identity. `no class noun` has `a photo of [V]` as caption and prompt (its priors are those of the right
class); `wrong class noun` has another demo class in caption, prompt and priors. The right noun is the row `with prior`
or `without prior`: with priors, the right noun alone shares its words with the prior caption and so bears its whole
pull; without them, only the noun differs. DIV (patch distance) is LPIPS's form over the identity encoder's patches.
The first table compares subject by subject, each as the mean of its training seeds, and says `met` of a sign only where
the whole interval has it, else `not shown`; in the last one columns named only by a row are identity."""


def report(found: dict, rows: list[dict]) -> str:
    """The results as Markdown."""
    columns = {key: title for key, title in COLUMNS.items() if any(key in row["scores"] for row in rows)}
    names = list(dict.fromkeys(row["variant"] for row in rows))
    extra = {f"{score}, {name}": (name, score) for name, score in DETAILS}
    about = found["about"]
    lines = [
        "# The shape of the paper's tables on the embedded base",
        "",
        "; ".join(f"{key} {value}" for key, value in about.items()) + ".",
        "",
        "| expected | measured, 95% interval over subjects | goal | |",
        "|---|---|---|---|",
    ]
    for one in found["findings"]:
        goal = {None: "", POSITIVE: "> 0"}.get(one["goal"], f">= {one['goal']}")
        lines.append(f"| {one['what']} | {shown(one)} | {goal} | {one['verdict']} |")
    lines += ["", "| row | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    real = {"identity": "real_identity", "clip_i": "real_clip_i"}
    cells = [shown(mean_interval(column(rows, BASE, real[key])).row()) if key in real else "" for key in columns]
    lines.append("| real images (no self pairs) | " + " | ".join(cells) + " |")
    for name in names:
        cells = [shown(mean_interval(values).row()) if (values := column(rows, name, key)) else "" for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", NOTES, "", "| subject | " + " | ".join([*names, "real images", *extra]) + " |"]
    lines.append("|---" * (len(names) + len(extra) + 2) + "|")
    for subject in sorted({row["subject"] for row in rows}):
        own = [row for row in rows if row["subject"] == subject]
        values = [column(own, name, "identity") for name in names] + [column(own, BASE, "real_identity")]
        values += [column(own, variant, score) for variant, score in extra.values()]
        lines.append(f"| {subject} | " + " | ".join(f"{value[0]:.3f}" for value in values) + " |")
    return "\n".join([*lines, ""])


SHEET = (
    (BASE, "plain", 2),
    ("with prior", "plain", 3),
    ("with prior", "placed", 4),
    ("with prior", "class", 2),
    ("without prior", "plain", 2),
    ("without prior", "class", 2),
    ("no class noun", "plain", 2),
    ("wrong class noun", "plain", 2),
)
"""The contact sheet's columns after the photos: variant, group, how many."""


def contact_sheet(subjects: list[Subject], sheets: dict, seed: int) -> Image.Image:
    """One row a subject: three photos, then pictures of the base and of each variant."""
    told = "3 photos | " + " | ".join(f"{count} {variant}, {group}" for variant, group, count in SHEET)
    rows, captions = [], []
    for subject in subjects:
        if (BASE, seed, subject.id) in sheets:
            cells = [Image.open(path).convert("RGB") for path in subject.images[:3]]
            for variant, group, count in SHEET:
                cells += read_images([file for _, file in sheets[variant, seed, subject.id][group][:count]])
            rows.append(cells)
            captions.append(f"{subject.id}: {told}")
    return grid(rows, captions, cell=64)


def write_results(target: Path, about: dict, rows: list[dict], subjects: list[Subject], sheets: dict) -> None:
    """target.json, .md and .png; the Markdown is printed too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    found = {"about": about, "findings": findings(rows), "rows": rows}
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = report(found, rows)
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    contact_sheet(subjects, sheets, rows[0]["seed"]).save(target.with_suffix(".png"), optimize=True)
    print(text)
