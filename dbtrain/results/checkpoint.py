"""Checkpoints of record: fp32 masters, AdamW moments, EMA and counters under a digest manifest.

They know nothing of world size or ZeRO stage. A checkpoint is a folder `step-00000100/` with `state.safetensors`,
`state.json` and `manifest.json` (sha256 of the other two). `latest` means the newest one whose manifest verifies.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbtrain.errors import DataError
from dbtrain.results.identity import About, Identity, Relation, difference, relation
from dbtrain.storage.atomic import file_digest, hidden, sweep, whole_folder

if TYPE_CHECKING:  # loads torch, which a fleet's driver does without
    from dbtrain.engines.engine import EngineState

STATE, ABOUT, MANIFEST = "state.safetensors", "state.json", "manifest.json"
STEP_FOLDER = re.compile(r"step-[0-9]{8}")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: the engine's state after `step` steps, and the digest `run` of the training.

    average: the running mean of the photos' error, which `train.stop_loss` is compared with; 0 where none is kept.
    about: see `identity.Identity`; empty in checkpoints of an earlier dbtrain. stop: what `train.stop` has seen; empty
    where it is off.
    """

    step: int
    run: str
    state: EngineState
    average: float = 0.0
    about: About = field(default_factory=dict)
    stop: Mapping[str, float] = field(default_factory=dict)


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """The folder of the checkpoint, written whole or not at all. Only the `keep` newest good checkpoints remain."""
    from safetensors.torch import save_file

    root.mkdir(parents=True, exist_ok=True)
    final = checkpoint_folder(root, checkpoint.step)
    sweep(root)
    flat = {f"{kind}/{name}": tensor for kind, group in checkpoint.state.items() for name, tensor in group.items()}
    about: dict[str, Any] = {"step": checkpoint.step, "run": checkpoint.run, "average": checkpoint.average}
    about |= {"about": checkpoint.about} if checkpoint.about else {}
    about |= {"stop": checkpoint.stop} if checkpoint.stop else {}
    with whole_folder(final) as temporary:
        save_file(flat, temporary / STATE)
        (temporary / ABOUT).write_text(json.dumps(about))
        digests = {name: file_digest(temporary / name) for name in (STATE, ABOUT)}
        (temporary / MANIFEST).write_text(json.dumps(digests, indent=1))
    tidy_checkpoints(root, keep)
    return final


def latest_checkpoint(root: Path, wanted: Identity) -> tuple[Path | None, list[str]]:
    """(folder of the newest checkpoint that verifies or None, one line for every newer one that does not).

    Raises DataError for a good checkpoint of another run, unless that is the same for fewer steps: resuming from it
    would mix two trainings.
    """
    passed_over: list[str] = []
    for folder in checkpoint_folders(root):
        defect = verify_checkpoint(folder)
        if not defect:
            return _own(folder, wanted), passed_over
        passed_over.append(f"{folder}: {defect}; falling back to the one before")
    return None, passed_over


def named_checkpoint(root: Path, name: str, wanted: Identity) -> Path:
    """The checkpoint of a folder's name. Raises DataError if it is missing, damaged or of another run."""
    there = ", ".join(folder.name for folder in checkpoint_folders(root)) or "none"
    if not (root / name).is_dir():
        raise DataError(f"checkpoint.resume: {root / name} does not exist (there are: {there}); correct the name")
    defect = verify_checkpoint(root / name)
    if defect:
        raise DataError(f"checkpoint.resume: {root / name}: {defect}; name another (there are: {there}), or `latest`")
    return _own(root / name, wanted)


def checkpoint_identity(folder: Path) -> Identity:
    """The training that a verified checkpoint belongs to."""
    about = _about(folder)
    return Identity.read(str(about.get("run")), about.get("about"))


def _own(folder: Path, wanted: Identity) -> Path:
    """A verified checkpoint's folder; DataError if it is another run's."""
    found = checkpoint_identity(folder)
    if relation(found, wanted) not in (Relation.SAME, Relation.LONGER):
        raise DataError(
            f"{folder}: belongs to a run with other settings or data ({difference(found, wanted)}); use another "
            "--out, or delete the folder to start afresh"
        )
    return folder


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. No file is parsed before its digest is checked."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        if not isinstance(digests, dict) or digests.keys() != {STATE, ABOUT}:
            return "its manifest does not list its files"
        for name, digest in digests.items():
            if file_digest(folder / name) != digest:
                return f"{name} differs from its digest"
        visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if strange := visible - {STATE, ABOUT, MANIFEST}:
            return f"holds {min(strange)!r}, which is none of its files"
        step = _about(folder)["step"]
        if folder.name != f"step-{step:08d}":
            return f"holds the state after step {step}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"unreadable ({error})"
    return None


def checkpoint_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint after so many steps, whether it is there or not."""
    return root / f"step-{step:08d}"


def newest_step(root: Path) -> int:
    """The step of the newest checkpoint, by its name; 0 where there is none. Whether it verifies is not looked at."""
    return step_of(folders[0]) if (folders := checkpoint_folders(root)) else 0


def step_of(folder: Path) -> int:
    """The steps made by a checkpoint, by its folder's name."""
    return int(folder.name.removeprefix("step-"))


def read_checkpoint(folder: Path) -> Checkpoint:
    """The contents of a verified checkpoint, on the CPU."""
    from safetensors.torch import load_file

    about = _about(folder)
    state: EngineState = {}
    for key, tensor in load_file(folder / STATE).items():
        kind, name = key.split("/", 1)
        state.setdefault(kind, {})[name] = tensor
    told = about.get("average", 0.0), about.get("about", {}), about.get("stop", {})
    return Checkpoint(about["step"], about["run"], state, *told)


def _about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ABOUT).read_text())


def checkpoint_folders(root: Path) -> list[Path]:
    """The folders of all checkpoints, the newest first; whether they verify is not looked at."""
    found = [path for path in root.iterdir() if STEP_FOLDER.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, reverse=True)


def tidy_checkpoints(root: Path, keep: int) -> None:
    """Remove the remains of killed writers, and every checkpoint older than the `keep` newest good ones.

    Damaged checkpoints do not count, so that the last good one is never deleted.
    """
    good = 0
    for folder in checkpoint_folders(root):
        if good >= keep:
            # Renamed first, so that a killed deletion leaves no half checkpoint under a real name.
            os.rename(folder, hidden(folder))
        else:
            good += verify_checkpoint(folder) is None
    if root.is_dir():
        sweep(root)
