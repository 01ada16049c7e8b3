"""A finished subject's weights in the formats that other programs read: written, and read back."""

from __future__ import annotations

import json
from pathlib import Path

from dbtrain.errors import ConfigError, DataError
from dbtrain.families import FAMILIES
from dbtrain.models.adapter_names import from_diffusers, to_diffusers, to_kohya
from dbtrain.models.adapters import LoraWeights
from dbtrain.results.record import refuse_changed
from dbtrain.storage.atomic import write_file

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"
MODEL_FOLDER = "model"


def save_safetensors(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Write tensors with string metadata, whole or not at all."""
    from safetensors.torch import save

    write_file(path, _in_order(save(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with sorted metadata: the library's order differs between processes, so digests would too."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def publish_lora(folder: Path, weights: LoraWeights, provenance: dict[str, str], kohya: bool) -> list[Path]:
    """The adapter files, which were written: diffusers' layout, and kohya's if asked for."""
    config = {
        f"{component}.{key}": value
        for component, matrices in weights.matrices.items()
        for key, value in {"r": weights.rank, "lora_alpha": weights.alpha, "target_modules": sorted(matrices)}.items()
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True), **provenance}
    save_safetensors(folder / LORA_FILE, to_diffusers(weights), metadata)
    written = [folder / LORA_FILE]
    if kohya:
        written.append(export_kohya(folder / KOHYA_FILE, weights, provenance))
    return written


def export_kohya(path: Path, weights: LoraWeights, provenance: dict[str, str]) -> Path:
    """The path of the adapter, which was written with kohya's key names and `ss_*` metadata.

    Raises ConfigError for a family without such names.
    """
    family = FAMILIES[provenance.get("family", "sd")]
    if family.kohya is None:
        raise ConfigError(f"{path}: {family.name} has no names in kohya's files that diffusers reads")
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(weights.rank),
        "ss_network_alpha": str(weights.alpha),
        **provenance,
    }
    save_safetensors(path, to_kohya(weights, family.kohya), metadata)
    return path


def read_lora(path: Path) -> tuple[LoraWeights, dict[str, str]]:
    """An adapter that dbtrain published (a file, or the folder that holds it), and its metadata.

    Raises DataError for a file that is no adapter, and for one that differs from the record beside it.
    """
    from safetensors import safe_open

    file = path / LORA_FILE if path.is_dir() else path
    refuse_changed(file)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except Exception as error:
        raise DataError(
            f"{file}: cannot be read as an adapter ({error}); give a folder or file that `dbtrain train` wrote"
        ) from error
    if not any(name.endswith(".lora_A.weight") for name in state):
        raise DataError(f"{file}: holds no adapter with diffusers' names; give the file that `dbtrain train` wrote")
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        alpha = next((float(value) for key, value in settings.items() if key.endswith(".lora_alpha")), None)
        return from_diffusers(state, alpha), metadata
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: is no adapter of diffusers' layout ({error!r}); train it again") from error
