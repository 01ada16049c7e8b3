"""Tensors that are computed once and kept in files, each under a digest.

A tensor's name is the digest of everything that decides its values (`about`). `NAME.safetensors` holds the tensor.
`NAME.json`, written last, holds `about` and the SHA-256 of that file. A tensor that does not verify is computed again.
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

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a folder that cannot be written."""


def kept_tensor(folder: Path, about: dict[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """The tensor that `about` names, on the CPU: read if its file verifies, else made and kept.

    Processes that ask at the same time wait for the one that makes it. In a folder that cannot be written, the tensor
    is made and not kept.
    """
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    tensor = _read(folder, name)
    if tensor is not None:
        return tensor
    try:
        with held(folder / f".{name}.lock", wait=True):
            tensor = _read(folder, name)
            if tensor is None:
                tensor = make().cpu()
                for ending in ("safetensors", "json"):
                    sweep(folder, f"{name}.{ending}")
                _write(folder, name, about, tensor)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
    return make().cpu() if tensor is None else tensor


def tensor_damage(folder: Path) -> list[str]:
    """One line for every tensor in a folder that does not verify. One without JSON is unfinished, not damaged."""
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
    record = {"sha256": hashlib.sha256(content).hexdigest(), "of": about}
    write_file(folder / f"{name}.safetensors", content)
    write_file(folder / f"{name}.json", json.dumps(record, indent=1).encode())
