"""A denoiser's weights on disk, read tensor by tensor: no rank of ZeRO stage 3 then holds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dbtrain.models.base_check import read_header, weight_files
from dbtrain.values import Parts


def parts_of(loader: Any, folder: Path, variant: str | None) -> Parts:
    """The parts of a component in a diffusers folder. loader: its class."""
    from safetensors import safe_open

    file_of = {name: file for file in weight_files(folder, variant) for name in read_header(file)}

    def tensor(name: str) -> Tensor:
        with safe_open(file_of[name], "pt") as file:
            return file.get_tensor(name)

    return Parts(lambda: loader.from_config(loader.load_config(folder)), sorted(file_of), tensor)
