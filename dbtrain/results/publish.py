"""A finished subject's weights in the formats that other programs read: written, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dbtrain.errors import ConfigError, DataError
from dbtrain.families import FAMILIES
from dbtrain.families.flux_names import with_diffusers_names
from dbtrain.models.adapter_names import to_diffusers, to_kohya
from dbtrain.models.adapters import TEXT_MODEL, LoraWeights
from dbtrain.models.foreign_adapters import read_state
from dbtrain.results.kohya_metadata import kohya_metadata
from dbtrain.results.record import refuse_changed
from dbtrain.storage.atomic import write_file

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"
PEFT_FILE = "adapter_model.safetensors"
MODEL_FOLDER = "model"


def save_safetensors(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Write tensors with string metadata, whole or not at all."""
    from safetensors.torch import save

    write_file(path, in_order(save(tensors, metadata)))


def in_order(content: bytes) -> bytes:
    """A safetensors file, or its header, with sorted metadata.

    The library's order differs between processes, and digests would differ with it.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def publish_lora(folder: Path, weights: LoraWeights, provenance: dict[str, str], kohya: bool) -> list[Path]:
    """The adapter files, which were written: diffusers' layout, and kohya's if asked for.

    In diffusers' layout alpha / rank is multiplied into B, and alpha is the rank: versions below 0.34 read no alpha.
    """
    folded = weights.folded()
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(peft_settings(folded), sort_keys=True)}
    metadata |= {"trained_alpha": str(weights.alpha), **provenance}
    save_safetensors(folder / LORA_FILE, to_diffusers(folded), metadata)
    written = [folder / LORA_FILE]
    if kohya:
        written.append(export_kohya(folder / KOHYA_FILE, weights, provenance))
    return written


def peft_settings(weights: LoraWeights) -> dict[str, Any]:
    """PEFT's settings of an adapter, by component. diffusers 0.34 to 0.39 fail without both patterns.

    PEFT compares the ends of layers' paths, so that the short names fit a text model of any transformers.
    """
    settings: dict[str, Any] = {}
    for component, matrices in weights.matrices.items():
        names = {path.removeprefix(TEXT_MODEL): len(down) for path, (down, _) in matrices.items()}
        ranks = {name: rank for name, rank in sorted(names.items()) if rank != weights.rank}
        settings |= {
            f"{component}.r": weights.rank,
            f"{component}.lora_alpha": weights.alpha,
            f"{component}.rank_pattern": ranks,
            f"{component}.alpha_pattern": {name: weights.scale * rank for name, rank in ranks.items()},
            f"{component}.target_modules": sorted(names),
        }
    return settings


def export_kohya(path: Path, weights: LoraWeights, provenance: dict[str, str], name: str = "") -> Path:
    """The path of the adapter, which was written with kohya's key names and metadata.

    name: what programs show; empty takes the file's. Raises ConfigError for a family without such names.
    """
    family = FAMILIES[provenance.get("family", "sd")]
    if family.kohya is None:
        raise ConfigError(f"{path}: {family.name} has no names in kohya's files that diffusers reads")
    tensors = to_kohya(weights, family.kohya)
    metadata = kohya_metadata(tensors, weights, family, provenance, name or provenance.get("subject") or path.stem)
    save_safetensors(path, tensors, {**provenance, **metadata})
    return path


def read_lora(path: Path) -> tuple[LoraWeights, dict[str, str]]:
    """An adapter of dbtrain or of another trainer (a file, or the folder that holds it), and its metadata.

    Raises DataError for a file that is no adapter, and for one that differs from the record beside it.
    """
    from safetensors import safe_open

    file = adapter_file(path)
    refuse_changed(file)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except Exception as error:
        raise DataError(f"{file}: cannot be read as an adapter ({error}); give a LoRA as .safetensors") from error
    try:
        settings = _settings_beside(file) | json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return read_state(with_diffusers_names(state), settings), metadata
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: its settings are not those of an adapter ({error!r}); make it again") from error


def adapter_file(path: Path) -> Path:
    """The adapter's file, of a path that is one or a folder that holds one: ours and diffusers', or PEFT's."""
    if not path.is_dir():
        return path
    return next((path / name for name in (LORA_FILE, PEFT_FILE) if (path / name).exists()), path / LORA_FILE)


def _settings_beside(file: Path) -> dict[str, Any]:
    """PEFT's own settings, which lie beside its file; empty elsewhere."""
    settings = file.parent / "adapter_config.json"
    if file.name != PEFT_FILE or not settings.exists():
        return {}
    return dict(json.loads(settings.read_text("utf-8")))
