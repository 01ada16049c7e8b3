"""A result in the formats of other programs: adapters with kohya's names, whole models as one checkpoint file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dbtrain.errors import ConfigError, DataError
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import LoraWeights
from dbtrain.models.foreign_adapters import told_families
from dbtrain.models.single_file import checkpoint_of
from dbtrain.results.publish import (
    LORA_FILE,
    MODEL_FOLDER,
    PEFT_FILE,
    adapter_file,
    export_kohya,
    in_order,
    read_lora,
)
from dbtrain.results.record import finished_record, read_record
from dbtrain.storage.atomic import hidden, sync_folder

OWN = ("format", "lora_adapter_metadata")
"""Metadata that describes the layout of a file, and not its adapter."""


def export(source: Path, out: str, family: str | None = None) -> Path:
    """The file written for a finished subject, an adapter of any trainer, or a whole model's folder.

    out: the file; for a folder that exists, or a name that ends in a slash, a file in it with the subject's name.
    family: of an adapter or model that does not say it itself. Raises ConfigError and DataError.
    """
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"--family: got {family!r}, want one of {', '.join(FAMILIES)}")
    if is_whole_model(source):
        return export_model(source, out, family)
    weights, metadata = read_lora(source)
    name = metadata.get("subject") or adapter_name(source)
    path = target(out, name, source)
    provenance = {key: value for key, value in metadata.items() if key not in OWN}
    provenance["family"] = family or family_of(weights, metadata, source)
    try:
        return export_kohya(path, weights, provenance, name)
    except (KeyError, ValueError) as error:
        raise DataError(f"{source}: kohya has no name for the layer {error} of {provenance['family']} models") from None


def adapter_name(source: Path) -> str:
    """What an adapter is called that does not say it: the name of its file, or of the folder around a usual name."""
    file = adapter_file(source).resolve()
    return file.parent.name if file.name in (LORA_FILE, PEFT_FILE) else file.stem


def family_of(weights: LoraWeights, metadata: dict[str, str], source: Path) -> str:
    """The family of an adapter, as its metadata or its layers tell. Raises DataError where both are silent."""
    said = metadata.get("family")
    if said in FAMILIES:
        return str(said)
    version = metadata.get("ss_base_model_version", "")
    for name in FAMILIES:
        if version not in ("", "unknown") and version == FAMILIES[name].base_version:
            return name
    if version.startswith("sdxl"):
        return "sdxl"
    told = told_families(weights)
    if len(told) != 1:
        asked = " or --family ".join(sorted(told) or FAMILIES)
        raise DataError(f"{source}: does not tell for which base it is; add --family {asked}")
    return told.pop()


def target(out: str, name: str, source: Path) -> Path:
    """The path to write. Raises ConfigError where that is the source itself, or a file of a finished subject."""
    path = Path(out)
    if path.is_dir() or out.endswith(("/", os.sep)):
        path = path / f"{name}.safetensors"
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
    if path.exists():
        held, own = read_record(path.parent), adapter_file(source)
        inside = source.is_dir() and any(path.samefile(file) for file in source.rglob("*.safetensors"))
        if inside or (own.exists() and path.samefile(own)) or (held is not None and path.name in held["files"]):
            raise ConfigError(f"--out: {path} is the published file itself; give another file")
    return path


def is_whole_model(source: Path) -> bool:
    """Whether a folder holds a whole model: a fully fine-tuned subject's, or a diffusers folder itself."""
    return (source / "model_index.json").exists() or (
        (source / MODEL_FOLDER / "model_index.json").exists() and not (source / LORA_FILE).exists()
    )


def export_model(source: Path, out: str, family: str | None) -> Path:
    """The checkpoint file written of a whole model."""
    from safetensors.torch import save_file

    name, folder = source.resolve().name, source
    if not (source / "model_index.json").exists():
        record = finished_record(source)
        name, folder, family = record["subject"], source / MODEL_FOLDER, family or record.get("family")
    path = target(out, name, source)
    kind = family or model_family(folder)
    tensors = {key: tensor.contiguous() for key, tensor in checkpoint_of(folder, kind).items()}
    temporary = hidden(path)
    try:
        save_file(tensors, temporary, {"format": "pt", "modelspec.title": name})
        sort_metadata(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return path


def sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors file's header, which then keeps its length; the tensors are not read."""
    with path.open("r+b") as file:
        size = file.read(8)
        head = size + file.read(int.from_bytes(size, "little"))
        ordered = in_order(head)
        if len(ordered) == len(head):  # else the offsets behind it would move
            file.seek(0)
            file.write(ordered)


def model_family(folder: Path) -> str:
    """The family of a diffusers folder, by the pipeline in its index."""
    said = json.loads((folder / "model_index.json").read_text("utf-8")).get("_class_name")
    for name in FAMILIES:
        if FAMILIES[name].pipeline == said:
            return name
    raise ConfigError(f"{folder}: is a {said}, for which there is no family; they are {', '.join(FAMILIES)}")
