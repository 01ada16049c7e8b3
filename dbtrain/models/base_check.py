"""What can be known to be wrong with a base model from its small files, before any weight is read.

A folder's index and configurations, or a single file's header, say what a base is. Each function returns one line, or
None where nothing is wrong or nothing can be known.
"""

from __future__ import annotations

import difflib
import json
import re
import struct
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, named
from dbtrain.models.family import Family

HEADER_BYTES = 2**25
"""Largest header of a .safetensors file that is read; Stable Diffusion XL's has 300 KB."""
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
DECIDING = re.compile(r"(text_encoder\w*|unet|transformer)$")
"""Components that one family has and another has not."""
ITS_FAMILY = "set model.family=auto, or to what it is"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
"""Stability's name of a U-Net's first convolution."""


PAIRS = "it edits pictures, and so learns from pairs of them, which a manifest does not hold"
REFUSED = {
    "HiDreamImagePipeline": "its experts see tokens in the order of their routing, so that a pack would mix subjects, "
    "and it needs four text encoders",
    "QwenImage21Pipeline": "the length of a caption moves the image's positions, and no padding keeps the result",
    "SanaSprintPipeline": "it is distilled to a few steps; train on Sana",
    "LuminaPipeline": "an older model of another architecture; train on Lumina-Image 2.0",
    **dict.fromkeys(
        ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        PAIRS,
    ),
}
"""Pipelines whose bases are not trained, and why."""


def base_problem(family: Family, source: str, variant: str | None = None) -> str | None:
    """Why a base that lies here cannot be one of this family; for a hub id, None."""
    place = Path(source)
    if place.is_file():
        return single_file_problem(family, place)
    if not place.is_dir():
        return None
    if not (place / "model_index.json").is_file():
        return f"{named(place)} has no model_index.json; give the folder of a diffusers pipeline"
    return folder_problem(family, place, variant)


def folder_problem(family: Family, place: Path, variant: str | None = None) -> str | None:
    """What keeps a diffusers folder from being used as a family's base."""
    index = read_json(place / "model_index.json")
    kind = index.get("_class_name", "model of an unknown kind")
    if kind in REFUSED:
        return f"{named(place)} is a {kind}, which dbtrain does not train: {REFUSED[kind]}; give another base"
    held = {name for name, entry in index.items() if isinstance(entry, list) and list(map(type, entry)) == [str, str]}
    vae = ["vae"] if "vae" in family.components else []
    wanted = {family.denoiser, *family.companions, *family.text_encoders, *vae}
    missing, more = sorted(wanted - held), sorted(filter(DECIDING.match, held - wanted))
    if missing or more:
        what = f"has no {missing[0]}" if missing else f"has a {more[0]} besides"
        return f"{named(place)} is a {kind}, no base of model.family={family.name} ({what}); {ITS_FAMILY}"
    channels, other = channel_problem(place, family), family.kind_problem(index)
    if channels and not (other and "another kind" in channels):
        return f"{named(place)} {channels}"
    if other:
        return f"{named(place)} is {other}, no base of model.family={family.name}; {ITS_FAMILY}"
    for name in sorted(wanted):
        problem = few_bits_problem(place / name) or weights_problem(place / name, variant)
        if problem:
            return problem
    return None


def channel_problem(place: Path, family: Family) -> str | None:
    """Why a U-Net does not take what its VAE makes: inpainting, depth and editing models take more. One that enlarges
    takes the small picture's three channels besides."""
    unet, vae = place / family.denoiser / "config.json", place / "vae" / "config.json"
    if family.denoiser != "unet" or not unet.is_file() or not (vae.is_file() or "vae" not in family.components):
        return None
    made = read_json(vae).get("latent_channels", 4) if "vae" in family.components else 3
    got, want = read_json(unet).get("in_channels"), made + (3 if family.guide else 0)
    if got in (None, want):
        return None
    if want == 4:
        return _channels(got, want)
    return f"is no base of model.family={family.name}: its U-Net takes {got} channels, want {want}; {ITS_FAMILY}"


INPUTS = {9: "an inpainting model", 5: "a depth model", 8: "a model that edits pictures"}
"""Kinds of models by what their U-Net takes in."""


def _channels(got: int, want: int) -> str:
    kind = INPUTS.get(got, "another kind of model")
    return f"is {kind}: its U-Net takes {got} channels, and text-to-image training has {want}; give another base"


def few_bits_problem(folder: Path) -> str | None:
    """Why a component that was published in few bits is not read: no adapter could be folded into it."""
    config = folder / "config.json"
    told = read_json(config).get("quantization_config") if config.is_file() else None
    if not told:
        return None
    kind = told.get("quant_method", "some kind") if isinstance(told, dict) else told
    return (f"{named(folder)} holds weights in few bits ({kind}); give a folder of the whole ones, and set "
            "model.quantize to keep them in few bits in training")  # fmt: skip


def weights_problem(folder: Path, variant: str | None) -> str | None:
    """Why a component's folder has no weights that can be read: another variant, or a format that can run code."""
    if not folder.is_dir():
        return f"{named(folder)} is missing; the base is not whole"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS)
    safe = [name for name in names if name.endswith(".safetensors")]
    variants = {_variant(name) for name in safe}
    if variant in variants or (variant is None and not names):
        return None if names else f"{named(folder)} has no weights; the base is not whole"
    if not safe:
        what = f"only {names[0]}" if names else "no weights"
        return (
            f"{named(folder)} has {what}, and only .safetensors are read, as other formats can run code; convert it: "
            "load the base with diffusers, then save_pretrained(FOLDER, safe_serialization=True)"
        )
    others = sorted(name for name in variants if name)
    if variant is None:
        return f"{named(folder)} has no plain weights, only {', '.join(others)}; set model.variant={others[0]}"
    remedy = f"model.variant={others[0]}" if others else "model.variant=null"
    return f"{named(folder)} has no weights of the variant {variant}; set {remedy}"


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that hold a component's weights of a variant."""
    return sorted(path for path in folder.glob("*.safetensors") if _variant(path.name) == variant)


def _variant(name: str) -> str | None:
    mark = re.search(r"\.([A-Za-z]\w*)(?:-\d+-of-\d+)?\.safetensors$", name)
    return mark[1] if mark else None


def single_file_problem(family: Family, path: Path) -> str | None:
    """What keeps a single file from being used as a family's base."""
    if path.suffix != ".safetensors":
        return f"{named(path)} is not a .safetensors file; other formats can run code, so convert it"
    header = read_header(path)
    encoders = 2 if any(name.startswith("conditioner.embedders.1.") for name in header) else 1
    if FIRST not in header:
        kind, pipeline = kind_of(header) or ("no model that is known here", None)
        if pipeline != family.pipeline:
            remedy = ITS_FAMILY if pipeline else "give a whole checkpoint of it"
            return f"{named(path)} is {kind}, no base of model.family={family.name}; {remedy}"
        return None
    edm = "edm_mean" in header
    if family.denoiser != "unet" or encoders != len(family.text_encoders) or edm != family.edm:
        kind = "Playground v2.5" if edm else "Stable Diffusion XL" if encoders == 2 else "Stable Diffusion 1 or 2"
        return f"{named(path)} is {kind}, no base of model.family={family.name}; {ITS_FAMILY}"
    channels = header[FIRST]["shape"][1]
    return None if channels == 4 else f"{named(path)} {_channels(channels, 4)}"


def kind_of(header: dict[str, Any]) -> tuple[str, str | None] | None:
    """What a file without a U-Net of Stability's is: its name, and the pipeline that it is a base of, if any."""
    for parts, kind, pipeline in KINDS:
        if all(any(part in name for name in header) for part in parts):
            return kind, pipeline
    return None


KINDS = (
    (("lora_",), "a LoRA", None),
    ((".lora_A.",), "a LoRA", None),
    (("joint_blocks.",), "Stable Diffusion 3", "StableDiffusion3Pipeline"),
    (("distilled_guidance_layer.",), "Chroma", "ChromaPipeline"),
    (("single_stream_modulation.", "guidance_in."), "FLUX.2 dev", "Flux2Pipeline"),
    (("single_stream_modulation.",), "FLUX.2 klein", "Flux2KleinPipeline"),
    (("double_blocks.",), "FLUX.1", "FluxPipeline"),
    (("layers.0.adaLN_modulation.",), "Z-Image", "ZImagePipeline"),
    (("cap_embedder.",), "Lumina 2", "Lumina2Pipeline"),
    (("txtfusion.",), "Krea 2", "Krea2Pipeline"),
    (("down_blocks.",), "a part of a diffusers folder", None),
)
"""What a file is by parts of its names, which are the authors' own: (parts, kind, pipeline). The first row decides."""


def marks_of(path: Path) -> set[str]:
    """The marks in a single file that stand for settings of its scheduler: `v_pred`, `ztsnr`."""
    return {"v_pred", "ztsnr"} & read_header(path).keys()


def read_header(path: Path) -> dict[str, Any]:
    """Names, kinds and shapes of the tensors in a .safetensors file. Raises DataError for a file that is none."""
    try:
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            if size > HEADER_BYTES:
                raise ValueError("its header is too large")
            header = json.loads(file.read(size))
            if not isinstance(header, dict) or file.tell() != 8 + size:
                raise ValueError("its header is cut")
        header.pop("__metadata__", None)
        if not all(isinstance(entry, dict) and isinstance(entry.get("shape"), list) for entry in header.values()):
            raise ValueError("its header names no tensors")
    except (OSError, ValueError, AttributeError, struct.error, RecursionError) as error:
        raise DataError(f"{named(path)}: cannot be read as a .safetensors file ({error}); fetch it again") from error
    return header


def path_problem(text: str) -> str | None:
    """Why a model source that names nothing here was meant as a path; None for one that is here, or for a hub id."""
    place = Path(text).expanduser()
    if place.exists():
        return None
    here = f"(a relative path counts from {Path.cwd()})"
    if "$" in text or re.search(r"%\w+%", text):
        return f"{named(text)}: variables such as $HOME are not replaced here; write the path out"
    if "\\" in text or re.match(r"[A-Za-z]:", text):
        return f"{named(text)}: is a path of Windows; write it with / as this machine has it"
    if text.startswith(("/", ".", "~")) or text.endswith(("/", *WEIGHTS)) or text.count("/") > 1:
        return f"{named(text)}: does not exist {here}{_near(place)}"
    if "/" in text and place.parent.is_dir():
        return f"{named(text)}: {named(place.parent)}/ is a folder here, and holds no {named(place.name)}{_near(place)}"
    return None if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) else f"{named(text)}: does not exist, and is no hub id"


def _near(place: Path) -> str:
    parent = place.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, 1)
    return f"; did you mean {named(parent / near[0])}?" if near else ""


def read_json(path: Path) -> dict[str, Any]:
    """A file of a base as a JSON object. Raises DataError for a file that is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{named(path)}: cannot be read ({error}); fetch the base again") from error
    if not isinstance(value, dict):
        raise DataError(f"{named(path)}: is no JSON object; fetch the base again")
    return value
