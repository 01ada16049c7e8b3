"""What a run would do, and its cost by what its own ledger or that of an earlier run measured."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from dbtrain.engines.kind import engine_here
from dbtrain.fleet.lease import find_ledger, has_ledger
from dbtrain.fleet.ledger import Ledger
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.manifest import read_manifest, scan_manifest


def plan_run(
    manifest: Path, config: RunConfig, out: Path, measured: Path | None, skip_bad: bool = False, gang: int = 1
) -> dict[str, Any]:
    """subjects (by state), classes, photos, photo_bytes, prior_images, engine, and `estimate`.

    skip_bad: without the subjects whose rows have findings; what is wrong with photos shows when they are read. Photos
    are those of the manifest; ready-made shards are not looked into.
    """
    own = config.data.shards is None
    subjects = scan_manifest(manifest, own)[0] if skip_bad else read_manifest(manifest, own)
    counts = {"waiting": len(subjects)}
    if has_ledger(out):
        with closing(Ledger(find_ledger(out))) as ledger:
            counts = {state: number for state, number in ledger.counts().items() if number}
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
        "engine": engine_here(config, gang),
        "estimate": estimate(measured or out, left, len(classes)),
    }


def estimate(source: Path, subjects: int, classes: int) -> dict[str, Any]:
    """GPU-seconds and bytes of results to come, by the means of a measured run. basis: how many measured subjects that
    rests on; 0 is unknown, and then the other values are None."""
    costs: list[tuple[str, float]] = []
    if has_ledger(source):
        with closing(Ledger(find_ledger(source))) as ledger:
            costs, prior_cost = ledger.costs()
    if not costs:
        return {"basis": 0, "gpu_seconds": None, "prior_gpu_seconds": None, "result_bytes": None, "from": None}
    sample = costs[:: max(1, len(costs) // 50)]
    files = [path for name, _ in sample for path in (source / "subjects" / name).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / len(sample)
    mean = sum(seconds for _, seconds in costs) / len(costs)
    return {
        "basis": len(costs),
        "gpu_seconds": round(mean * subjects, 1),
        "prior_gpu_seconds": None if prior_cost is None else round(prior_cost * classes, 1),
        "result_bytes": round(size * subjects),
        "from": str(source),
    }


def describe(plan: dict[str, Any]) -> str:
    """A plan for people."""
    cost = plan["estimate"]
    states = ", ".join(f"{number} {state}" for state, number in plan["subjects"].items())
    lines = [
        f"subjects: {states}, in {plan['classes']} classes",
        f"shards: {plan['photos']} photos, {plan['photo_bytes'] / 2**20:.1f} MiB",
        f"priors: {plan['prior_images']} images",
        plan["engine"],
    ]
    if not cost["basis"]:
        lines.append("cost: not known, as nothing was measured; give --measured RUN, a run of a few subjects")
        return "\n".join(lines)
    prior = "" if cost["prior_gpu_seconds"] is None else f" and {cost['prior_gpu_seconds']:g} for priors"
    lines.append(
        f"cost: {cost['gpu_seconds']:g} GPU-seconds{prior}, {cost['result_bytes'] / 2**20:.1f} MiB of results, by "
        f"{cost['basis']} subjects measured in {cost['from']}"
    )
    return "\n".join(lines)
