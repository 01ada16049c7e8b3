"""Tensors that were worked out once and are kept in files under a proof, beside what they were made from.

A tensor's name is the digest of everything that decides it (`about`). `NAME.safetensors` holds it; `NAME.json`, written
last, says what it is of and has its SHA-256. What does not verify is worked out again.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dbtrain.storage.atomic import file_digest, held, sweep, write_file

REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def proved_tensor(folder: Path, about: dict[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """The tensor that `about` names, on the CPU: read if it is there and verifies, else made and kept.

    Processes that ask at once wait for the one that makes it. Where the folder cannot be written, nothing is kept.
    """
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    found = _read(folder, name)
    if found is not None:
        return found
    try:
        with held(folder / f".{name}.lock", wait=True):
            found = _read(folder, name)
            if found is None:
                found = make().cpu()
                for ending in ("safetensors", "json"):
                    sweep(folder, f"{name}.{ending}")
                _write(folder, name, about, found)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
    return make().cpu() if found is None else found


def tensor_damage(folder: Path) -> list[str]:
    """One line for every tensor kept in a folder that does not verify; unfinished ones are no damage."""
    names = sorted(path.stem for path in folder.glob("*.json"))
    return [
        f"{folder / name}.safetensors: differs from its digest; delete it" for name in names if not _sound(folder, name)
    ]


def _sound(folder: Path, name: str) -> bool:
    try:
        about = json.loads((folder / f"{name}.json").read_text())
        return file_digest(folder / f"{name}.safetensors") == about["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _read(folder: Path, name: str) -> Tensor | None:
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")["value"] if _sound(folder, name) else None


def _write(folder: Path, name: str, about: dict[str, Any], value: Tensor) -> None:
    from safetensors.torch import save

    content = save({"value": value.contiguous()})
    proof = {"sha256": hashlib.sha256(content).hexdigest(), "of": about}
    write_file(folder / f"{name}.safetensors", content)
    write_file(folder / f"{name}.json", json.dumps(proof, indent=1).encode())
