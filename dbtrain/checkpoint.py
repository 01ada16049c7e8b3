"""Checkpoints of record: fp32 masters, AdamW moments, EMA and counters under a digest manifest.

They know nothing of world size or ZeRO stage. A checkpoint is a folder `step-00000100/` with `state.safetensors`,
`state.json` and `manifest.json` (sha256 of the other two). `latest` means the newest one whose manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from dbtrain.atomic import replace_dir, sweep
from dbtrain.engines.engine import EngineState
from dbtrain.errors import DataError

STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: the engine's state after `step` steps, and whose it is."""

    step: int
    run: str
    state: EngineState


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """The folder written, whole or not at all; afterwards only the `keep` newest good ones remain."""
    from safetensors.torch import save_file

    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{checkpoint.step:08d}"
    sweep(root, final.name)
    temporary = root / f".{final.name}.00000000.tmp"
    temporary.mkdir()
    flat = {f"{kind}/{name}": tensor for kind, group in checkpoint.state.items() for name, tensor in group.items()}
    save_file(flat, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": checkpoint.step, "run": checkpoint.run}))
    digests = {name: file_digest(temporary / name) for name in ("state.safetensors", "state.json")}
    (temporary / "manifest.json").write_text(json.dumps(digests, indent=1))
    replace_dir(temporary, final)
    _retire(root, keep)
    return final


def latest_checkpoint(root: Path, run: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, or None, and a line for every newer one that did not.

    Raises DataError for a good checkpoint of another run: resuming from it would mix two trainings.
    """
    passed_over = []
    for folder in _folders(root):
        defect = verify_checkpoint(folder)
        if defect:
            passed_over.append(f"{folder}: {defect}; falling back to the one before")
            continue
        checkpoint = read_checkpoint(folder)
        if checkpoint.run != run:
            raise DataError(
                f"{folder}: belongs to a run with other settings or data (run {checkpoint.run[:12]}, "
                f"this one is {run[:12]}); use another --out, or delete the folder to start afresh"
            )
        return checkpoint, passed_over
    return None, passed_over


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None; nothing is parsed but the manifest."""
    try:
        digests = json.loads((folder / "manifest.json").read_text())
        names = {"state.safetensors", "state.json"}
        if not isinstance(digests, dict) or digests.keys() != names:
            return "its manifest does not list its files"
        for name, digest in digests.items():
            if file_digest(folder / name) != digest:
                return f"{name} differs from its digest"
    except (OSError, ValueError, RecursionError) as error:
        return f"unreadable ({error})"
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """The contents of a verified checkpoint, on the CPU."""
    from safetensors.torch import load_file

    about = json.loads((folder / "state.json").read_text())
    state: EngineState = {}
    for key, tensor in load_file(folder / "state.safetensors").items():
        kind, name = key.split("/", 1)
        state.setdefault(kind, {})[name] = tensor
    return Checkpoint(about["step"], about["run"], state)


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(root: Path) -> list[Path]:
    found = [path for path in root.iterdir() if STEP_FOLDER.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, reverse=True)


def _retire(root: Path, keep: int) -> None:
    good = 0
    for folder in _folders(root):
        good += verify_checkpoint(folder) is None
        if good > keep:
            shutil.rmtree(folder)
