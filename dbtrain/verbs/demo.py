"""`dbtrain demo`: the main job on the embedded base, for every demo subject; then scores, a sheet and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dbtrain.evaluate.protocol import Protocol
from dbtrain.evaluate.summary import evaluate
from dbtrain.report import build
from dbtrain.results.sheets import grid
from dbtrain.settings.recipes import load
from dbtrain.subjects.manifest import read_manifest
from dbtrain.tiny import DEMO, DEMO_REAL
from dbtrain.train import train_chosen
from dbtrain.training.telemetry import peak_memory_gib
from dbtrain.values import Subject

COUNTS = {DEMO: 8, DEMO_REAL: 1}
"""Subjects of each demo manifest that fit into five minutes on two cores; `--all` takes every one."""
CLASS_IMAGES = 4
"""Images of the class prompt for each subject; the others are the samples that training has drawn."""


@dataclass(frozen=True)
class Shown:
    """What the demo leaves: records of subjects, scores of each run, sheets, reports, seconds, peak memory."""

    records: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    sheets: list[Path]
    reports: list[Path]
    seconds: float
    evaluation_s: float
    peak_memory_gib: float


def run_demo(out: Path, recipe: str, overrides: Sequence[str], everything: bool = False) -> Shown:
    """What the demo leaves. Drawn subjects are trained and scored in `out`, real ones in `out`/real."""
    start, evaluation_s = time.perf_counter(), 0.0
    config = load(recipe, [f"prior.store={out / 'priors'}", *overrides])
    records, scores, sheets, reports = [], [], [], []
    for manifest, folder in [(DEMO, out), (DEMO_REAL, out / "real")]:
        known = read_manifest(manifest)
        subjects = known[: None if everything else COUNTS[manifest]]
        done, failed = train_chosen(known, (), config, folder, [subject.id for subject in subjects])
        records += done + [{"subject": subject, "failed": reason} for subject, reason in failed.items()]
        sheets.append(_sheet(subjects, folder))
        begin = time.perf_counter()
        if done:
            scores.append(evaluate(folder, Protocol(class_images=CLASS_IMAGES)))
        evaluation_s += time.perf_counter() - begin
        reports.append(build(folder))
    seconds = time.perf_counter() - start
    return Shown(records, scores, sheets, reports, seconds, evaluation_s, peak_memory_gib("cpu"))


def _sheet(subjects: Sequence[Subject], folder: Path) -> Path:
    """One row a subject: its photos, then its samples."""
    rows, captions = [], []
    for subject in subjects:
        samples = sorted((folder / "subjects" / subject.id / "samples" / "samples").glob("*.png"))
        images = [Image.open(path).convert("RGB") for path in [*subject.images[:4], *samples]]
        rows.append([image.resize((64, 64), Image.Resampling.LANCZOS) for image in images])
        captions.append(f"{subject.id} ({subject.class_noun}): {min(4, len(subject.images))} photos, then samples")
    path = folder / "demo.png"
    grid(rows, captions, cell=96).save(path)
    return path


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a plain text table."""
    lines = [f"{'subject':<18}{'class':<16}{'identifier':<12}{'steps':>6}{'loss':>9}{'seconds':>9}"]
    for record in records:
        if "failed" in record:
            lines.append(f"{record['subject']:<18}failed: {record['failed']}")
            continue
        names = f"{record['subject']:<18}{record['class']:<16}{record['identifier']:<12}"
        lines.append(f"{names}{record['steps']:>6}{record['loss']:>9.4f}{sum(record['stages_s'].values()):>9.1f}")
    return "\n".join(lines)
