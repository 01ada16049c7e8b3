"""Base models from diffusers folders, hub ids and single files, and their digests."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from dbtrain.engines.unit_scale import drop_unit_divisions
from dbtrain.errors import ConfigError, DataError, first_line
from dbtrain.models.architectures import class_of
from dbtrain.models.base_check import base_problem, marks_of, path_problem
from dbtrain.models.family import Family, Models, encode_texts, is_local
from dbtrain.models.parts import parts_of
from dbtrain.models.schedules import changed
from dbtrain.models.texts import Texts
from dbtrain.objective.noise import discrete_schedule
from dbtrain.settings.config import ModelConfig
from dbtrain.storage.atomic import file_digest
from dbtrain.tiny import NAMED
from dbtrain.values import Parts

A_HUB_ID = "a hub id (fetched once; without network it must be in the hub's cache)"


def source_of(path: str) -> str:
    """Where a model is read from: `embedded` and `embedded-upscaler` ship with dbtrain."""
    return str(NAMED[path]) if path in NAMED else str(Path(path).expanduser()) if path.startswith("~") else path


def refuse_base(family: Family, config: ModelConfig) -> None:
    """Raise ConfigError where small files, or the path itself, show that a base cannot be used as this family's."""
    try:
        source = source_of(config.path)
        problem = path_problem(config.path) if config.path not in NAMED else None
        problem = problem or base_problem(family, source, config.variant)
    except DataError as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"model.path: {problem}")


def load_models(family: Family, config: ModelConfig, apart: bool = False) -> Models:
    """The base model in `model.dtype` (its VAE in fp32), frozen, in evaluation mode, on the CPU.

    apart: the text encoders are left to `Models.texts`, denoiser and VAE to `Models.pending`; a single file is always
    loaded as a whole. Raises ConfigError when the source is missing or is no model of this family.
    """
    quiet_libraries()
    source = source_of(config.path)
    refuse_base(family, config)
    mind_the_network(source, *filter(None, [config.single_file_layout]))
    if source.endswith((".safetensors", ".ckpt")):
        return _load_single_file(family, config, source)
    with _told_as(family, config):
        index = _index(family, source, config)
        tokenizers = {
            name: _load_part_tokenizer(family, source, name.replace("text_encoder", "tokenizer"), index, config)
            for name in family.text_encoders
        }
        scheduler = _load_scheduler(source, "scheduler", index, config)
        guide = _load_scheduler(source, family.guide.scheduler, index, config) if family.guide else None
    load, first = partial(_load_parts, family, config, source, index), modules_of(family, texts=False)
    parts = {name: torch.nn.Module() for name in first} if apart else load((*first, *family.text_encoders))
    models = _assemble(family, config, source, parts, tokenizers, scheduler)
    models.told = {name: index[name] for name in family.told if name in index}
    if guide is not None:
        models.guide_scheduler, models.levels = guide, discrete_schedule(guide.alphas_cumprod, "epsilon")
    if apart:
        models.texts = Texts(partial(load, family.text_encoders), partial(encode_texts, family, models))
        models.load, models.pending = load, True
        models.parts = partial(_denoiser_parts, family, config, source, index)
    return models


@contextmanager
def _told_as(family: Family, config: ModelConfig) -> Iterator[None]:
    """What the libraries raise for a base that they cannot load, as a ConfigError."""
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"model.path: cannot load {config.path!r} as {family.name}: {first_line(error)}; {_variant_hint(error)}"
            f"give a diffusers folder, a .safetensors file, or {A_HUB_ID}"
        ) from error


def _load_parts(
    family: Family, config: ModelConfig, source: str, index: dict[str, Any], names: Sequence[str]
) -> dict[str, torch.nn.Module]:
    """Components by name, frozen and in evaluation mode."""
    with _told_as(family, config):
        parts = {name: _load_component(family, source, name, index, config) for name in names}
    return frozen(family, parts)


def frozen(family: Family, parts: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """Components by name, frozen and in evaluation mode."""
    for name, module in parts.items():
        module.requires_grad_(False).eval()
        if name == family.denoiser:
            drop_unit_divisions(module)
    return parts


def modules_of(family: Family, texts: bool = True) -> list[str]:
    """Names on disk of the modules that are loaded: denoiser, its companions, autoencoder if there is one, and text
    encoders."""
    vae = ["vae"] if "vae" in family.components else []
    return [family.denoiser, *family.companions, *vae, *(family.text_encoders if texts else ())]


def _variant_hint(error: Exception) -> str:
    """What may help where a hub model's weights are not found: many hold fp16 weights alone."""
    text = str(error)
    told = ".safetensors" in text or ".bin" in text
    return "if it holds fp16 weights alone, set model.variant=fp16; " if told else ""


def _assemble(
    family: Family, config: ModelConfig, source: str, parts: dict, tokenizers: dict, scheduler: Any
) -> Models:
    schedule, scheduler = family.schedule(scheduler, config)
    return Models(
        denoiser=parts[family.denoiser],
        vae=parts.get("vae"),
        companions={name: parts[name] for name in family.companions},
        text_encoders={name: parts[name] for name in family.text_encoders if name in parts},
        tokenizers=tokenizers,
        scheduler=scheduler,
        schedule=schedule,
        source=config.path,
        digests=digests_of(source) if is_local(source) else commit_of(source, config),
    )


def index_path(source: str, config: ModelConfig) -> Path:
    """The `model_index.json` of a folder, or of a hub id, fetched where it is not in the cache."""
    from huggingface_hub import hf_hub_download

    name = "model_index.json"
    return Path(source) / name if is_local(source) else Path(hf_hub_download(source, name, revision=config.revision))


def _index(family: Family, source: str, config: ModelConfig) -> dict[str, Any]:
    index = json.loads(index_path(source, config).read_text())
    if problem := family.kind_problem(index):
        raise ValueError(f"it is {problem}, and this family is {family.pipeline}")
    return index


def _denoiser_parts(family: Family, config: ModelConfig, source: str, index: dict[str, Any]) -> Parts:
    """The denoiser's weights tensor by tensor; a hub model's files are fetched."""
    from huggingface_hub import snapshot_download

    name = family.denoiser
    with _told_as(family, config):
        if not is_local(source):
            source = snapshot_download(source, revision=config.revision, allow_patterns=[f"{name}/*"])
        return parts_of(_class_of_component(family, name, index), Path(source) / name, config.variant)


def _class_of_component(family: Family, name: str, index: dict[str, Any]) -> Any:
    known = {entry.partition(":")[2]: entry for entry in family.components[name]}
    class_name = index[name][1]
    if class_name not in known:
        raise ValueError(f"component {name} is a {class_name}, want one of {', '.join(known)}")
    return class_of(known[class_name])


def _load_component(family: Family, source: str, name: str, index: dict, config: ModelConfig) -> torch.nn.Module:
    loader = _class_of_component(family, name, index)
    variant = {"variant": config.variant} if config.variant else {}
    dtype = torch.bfloat16 if config.dtype == "bf16" and name != "vae" else torch.float32
    return loader.from_pretrained(
        source, subfolder=name, revision=config.revision, use_safetensors=True, torch_dtype=dtype, **variant
    )


def _load_part_tokenizer(family: Family, source: str, name: str, index: dict, config: ModelConfig) -> Any:
    known = family.components.get(name, ("transformers:CLIPTokenizer",))
    told = index.get(name, (None, ""))[1]
    loader = class_of(next((entry for entry in known if entry.partition(":")[2] == told), known[0]))
    return _with_vocabulary(loader.from_pretrained(source, subfolder=name, revision=config.revision))


def _with_vocabulary(tokenizer: Any) -> Any:
    """The tokenizer; ValueError for an empty one, which transformers makes where there are no files."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError("its tokenizer has no vocabulary on this machine")
    return tokenizer


def _load_scheduler(source: str, name: str, index: dict, config: ModelConfig) -> Any:
    import diffusers

    return getattr(diffusers, index[name][1]).from_pretrained(source, subfolder=name, revision=config.revision)


def _load_single_file(family: Family, config: ModelConfig, source: str) -> Models:
    import diffusers

    if not source.endswith(".safetensors") or not is_local(source):
        raise ConfigError(
            f"model.path: {config.path!r} must be an existing .safetensors file; .ckpt files can run code"
        )
    layout = {"config": source_of(config.single_file_layout)} if config.single_file_layout else {}
    try:
        pipeline = getattr(diffusers, family.pipeline).from_single_file(source, torch_dtype=torch.float32, **layout)
    except Exception as error:
        raise ConfigError(
            f"model.path: cannot read {config.path!r} as {family.name}: {first_line(error)}; "
            "offline, set model.single_file_layout to a diffusers folder of the same architecture"
        ) from error
    parts = {name: getattr(pipeline, name) for name in modules_of(family)}
    if config.dtype == "bf16":
        parts |= {name: module.to(torch.bfloat16) for name, module in parts.items() if name != "vae"}
    tokenizers = {name: getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in family.text_encoders}
    return _assemble(
        family, config, source, frozen(family, parts), tokenizers, marked(pipeline.scheduler, marks_of(Path(source)))
    )


def marked(scheduler: Any, marks: set[str]) -> Any:
    """The scheduler as the marks of a single file want it: `v_pred` predicts v, `ztsnr` has zero terminal SNR."""
    told: dict[str, Any] = {}
    if "v_pred" in marks:
        told["prediction_type"] = "v_prediction"
    if "ztsnr" in marks:
        told |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if not told:
        return scheduler
    return changed(scheduler, type(scheduler), told)


def mind_the_network(*sources: str) -> None:
    """Nothing; if a source is a hub id and the hub does not answer, ids are looked up in its cache alone from now on.
    Each of the many requests for a model would else be tried again for half a minute."""
    if not all(map(is_local, sources)):
        _ask_the_hub()


@cache
def _ask_the_hub() -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP library of the day raises; with HF_HUB_OFFLINE=1 the hub's own refusal
        constants.HF_HUB_OFFLINE = True


def quiet_libraries() -> None:
    """Switch off progress bars and advice of diffusers and transformers: they are about their own internals."""
    for name in ("torchao", "torch.utils._pytree"):  # diffusers imports torchao, which names what it cannot load here
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load_tokenizer(path: str) -> Any:
    """The tokenizer that identifiers are chosen in (`Models.identifying`), of a diffusers folder, a hub id or
    `embedded`; or the tokenizer in a folder of its own."""
    from transformers import AutoTokenizer, CLIPTokenizer

    source = source_of(path)
    mind_the_network(source)
    try:
        for name, kind in _tokenizers_of(source)[-1:]:
            loader = class_of(f"transformers:{kind}") if kind.startswith(("CLIP", "T5", "Qwen")) else AutoTokenizer
            return _with_vocabulary(loader.from_pretrained(source, subfolder=name))
        if (Path(source) / "tokenizer").is_dir() or not is_local(source):
            return _with_vocabulary(CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"))
        return _with_vocabulary(AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: no tokenizer found: {first_line(error)}; give a model or tokenizer folder, or {A_HUB_ID}"
        ) from error


def _tokenizers_of(source: str) -> list[tuple[str, str]]:
    """Names and classes of a pipeline's tokenizers, in order; empty where there is no index of a pipeline."""
    from huggingface_hub import hf_hub_download

    name = "model_index.json"
    try:
        path = Path(source) / name if is_local(source) else Path(hf_hub_download(source, name))
        index = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return sorted((name, entry[1]) for name, entry in index.items() if name.startswith("tokenizer") and entry[1])


def digests_of(source: str) -> dict[str, str]:
    """sha256 of every weight, tokenizer and scheduler file of a local model by its relative path; empty for hub ids."""
    root = Path(source)
    kinds = ("*/*.safetensors", "tokenizer*/*", "scheduler/*.json", "*_scheduler/*.json")
    files = [root] if root.is_file() else sorted({path for kind in kinds for path in root.glob(kind) if path.is_file()})
    return {file.name if root.is_file() else file.relative_to(root).as_posix(): file_digest(file) for file in files}


def commit_of(source: str, config: ModelConfig) -> dict[str, str]:
    """What names a hub model's files as digests would: its id, the commit that was read, and the variant."""
    return {"source": source, "commit": index_path(source, config).parent.name, "variant": config.variant or ""}


def base_digest(models: Models) -> str:
    """One sha256 that names the base model: of its files' digests, or of a hub model's id, commit and variant."""
    text = json.dumps(models.digests or {"source": models.source}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
