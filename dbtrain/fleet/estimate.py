"""What a run would do and cost, by what was measured: in its own ledger, or in that of an earlier run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dbtrain.fleet.ledger import NAME, Ledger, find_ledger
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.manifest import read_manifest, scan_manifest


def plan_run(
    manifest: Path, config: RunConfig, out: Path, measured: Path | None, skip_bad: bool = False
) -> dict[str, Any]:
    """subjects (by state), classes, photos, photo_bytes, prior_images, and the estimate: gpu_seconds to come, bytes of
    results to come, and `basis`, how many measured subjects that rests on (0: unknown, None values). skip_bad: without
    the subjects whose rows have findings; what is wrong with photos shows when they are read. Photos are those of the
    manifest; ready-made shards are not looked into."""
    own = config.data.shards is None
    subjects = scan_manifest(manifest, own)[0] if skip_bad else read_manifest(manifest, own)
    counts = {"waiting": len(subjects)}
    if (find_ledger(out) / NAME).exists():
        ledger = Ledger(find_ledger(out))
        counts = {state: number for state, number in ledger.counts().items() if number}
        ledger.close()
    left = counts.get("waiting", 0) + counts.get("running", 0)
    classes = Counter(subject.class_noun for subject in subjects)
    photos = [path for subject in subjects for path in subject.images]
    prior_images = config.prior.images * len(classes) if config.prior.weight > 0 else 0
    return {
        "subjects": counts,
        "classes": len(classes),
        "photos": len(photos),
        "photo_bytes": sum(path.stat().st_size for path in photos),
        "prior_images": prior_images,
        "estimate": estimate(measured or out, left, len(classes)),
    }


def estimate(source: Path, subjects: int, classes: int) -> dict[str, Any]:
    """Means of what an earlier run measured, times what is to be done."""
    nothing = {"basis": 0, "gpu_seconds": None, "prior_gpu_seconds": None, "result_bytes": None, "from": None}
    if not (find_ledger(source) / NAME).exists():
        return nothing
    ledger = Ledger(find_ledger(source))
    rows = ledger.rows("id, gpu_seconds", "state='finished' AND gpu_seconds IS NOT NULL")
    prior = ledger.db.execute("SELECT sum(gpu_seconds), count(DISTINCT class) FROM spent WHERE kind='prior'").fetchone()
    ledger.close()
    if not rows:
        return nothing
    sample = rows[:: max(1, len(rows) // 50)]
    size = sum(folder_bytes(source / "subjects" / row["id"]) for row in sample) / len(sample)
    each = sum(row["gpu_seconds"] for row in rows) / len(rows)
    return {
        "basis": len(rows),
        "gpu_seconds": round(each * subjects, 1),
        "prior_gpu_seconds": round(prior[0] / prior[1] * classes, 1) if prior[1] else None,
        "result_bytes": round(size * subjects),
        "from": str(source),
    }


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe(plan: dict[str, Any]) -> str:
    """A plan for people."""
    found = plan["estimate"]
    states = ", ".join(f"{number} {state}" for state, number in plan["subjects"].items())
    lines = [
        f"subjects: {states}, in {plan['classes']} classes",
        f"shards: {plan['photos']} photos, {plan['photo_bytes'] / 2**20:.1f} MiB",
        f"priors: {plan['prior_images']} images",
    ]
    if not found["basis"]:
        lines.append("cost: not known, as nothing was measured; give --measured RUN, a run of a few subjects")
        return "\n".join(lines)
    prior = "" if found["prior_gpu_seconds"] is None else f" and {found['prior_gpu_seconds']:g} for priors"
    lines.append(
        f"cost: {found['gpu_seconds']:g} GPU-seconds{prior}, {found['result_bytes'] / 2**20:.1f} MiB of results, by "
        f"{found['basis']} subjects measured in {found['from']}"
    )
    return "\n".join(lines)
