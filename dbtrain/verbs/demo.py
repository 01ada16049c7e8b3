"""`dbtrain demo`: both stages on the embedded models, all subjects in a pack; then scores, a sheet and a report."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dbtrain.evaluate.protocol import Protocol
from dbtrain.evaluate.summary import evaluate
from dbtrain.report import build
from dbtrain.results.record import stage_seconds
from dbtrain.results.sheets import grid
from dbtrain.settings.recipes import load
from dbtrain.subjects.manifest import read_manifest
from dbtrain.tiny import DEMO_LARGE, DEMO_REAL
from dbtrain.train import train_chosen
from dbtrain.training.telemetry import peak_memory_gib
from dbtrain.values import Subject

COUNTS = {DEMO_LARGE: 8, DEMO_REAL: 0}
"""Subjects of each demo manifest that fit into three minutes on two cores; `--all` takes every one."""
SECOND = ("tiny_upscaler train.method=lora lora.targets=[time_emb_proj] train.lr=0.01 train.schedule=linear "
          "train.steps=10 train.batch=1 sample.images=0")  # fmt: skip
"""Stage (b) as a pack can train it: its adapters change each channel's scale and shift, and no convolution of 3 x 3."""
SHORTER = {"tiny_packed": ("train.steps=150",)}
"""Recipe -> what makes it fit into three minutes: with all its steps it takes a minute more."""
CLASS_IMAGES = 4
"""Images of the class prompt for each subject; the others are the samples that training has drawn."""


@dataclass(frozen=True)
class Shown:
    """What the demo leaves: records of subjects, scores of each run, sheets, reports, seconds, peak memory."""

    records: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    sheets: list[Path]
    reports: list[Path]
    seconds: float = 0.0
    peak_memory_gib: float = 0.0


def demo_words(recipe: str, out: Path, count: int) -> list[str]:
    """The demo's own settings for `count` subjects over a recipe's. Class images are drawn in half of its steps."""
    pack = [f"prior.store={out / 'priors'}", f"engine.packed.size={count}", f"stages=['{SECOND}']", "prior.steps=10"]
    return [*pack, *SHORTER.get(recipe, ())]


def run_demo(out: Path, recipe: str, overrides: Sequence[str], everything: bool = False) -> Shown:
    """What the demo leaves. Drawn subjects are trained and scored in `out`, real ones in `out`/real."""
    start, shown = time.perf_counter(), Shown([], [], [], [])
    for manifest, folder in [(DEMO_LARGE, out), (DEMO_REAL, out / "real")]:
        subjects = read_manifest(manifest)[: None if everything else COUNTS[manifest]]
        if not subjects:
            continue
        own = demo_words(recipe, out, len(subjects))
        done, failed = train_chosen(subjects, (), load(recipe, [*own, *overrides]), folder, [s.id for s in subjects])
        shown.records.extend(done + [{"subject": name, "failed": reason} for name, reason in failed.items()])
        shown.sheets.append(_sheet(subjects, folder, {row["subject"] for row in done}))
        if done:
            shown.scores.append(evaluate(folder, Protocol(class_images=CLASS_IMAGES)))
        shown.reports.append(build(folder))
    return replace(shown, seconds=time.perf_counter() - start, peak_memory_gib=peak_memory_gib("cpu"))


def _sheet(subjects: Sequence[Subject], folder: Path, done: Collection[str]) -> Path:
    """One row a subject: two photos, then each prompt's first picture, by stage (a) alone and by both stages."""
    rows, captions = [], []
    for subject in subjects:
        drawn = folder / "subjects" / subject.id / "samples"
        large = sorted((drawn / "samples").glob("*-image-00.png")) if subject.id in done else []
        pairs = [path for one in large for path in (drawn / "samples-small" / one.name, one) if path.exists()]
        images = [Image.open(path).convert("RGB") for path in [*subject.images[:2], *pairs]]
        rows.append([image.resize((128, 128), Image.Resampling.BICUBIC) for image in images])
        captions.append(f"{subject.id} ({subject.class_noun}): photos, then pairs: (a), enlarged plainly | (a) and (b)")
    grid(rows, captions).save(folder / "demo.png")
    return folder / "demo.png"


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a plain text table."""
    lines = [f"{'subject':<18}{'class':<16}{'identifier':<12}{'steps':>6}{'loss':>9}{'seconds':>9}"]
    for record in records:
        if "failed" in record:
            lines.append(f"{record['subject']:<18}failed: {record['failed']}")
            continue
        names = f"{record['subject']:<18}{record['class']:<16}{record['identifier']:<12}"
        lines.append(f"{names}{record['steps']:>6}{record['loss']:>9.4f}{sum(stage_seconds(record).values()):>9.1f}")
    return "\n".join(lines)
