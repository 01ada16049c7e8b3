"""Features of images and texts by any transformers encoder: from a folder, a hub id, or the embedded ones.

Features are float32 tensors of unit rows on the CPU, so a dot product of two rows is their cosine.
Pictures are prepared with PIL and torch as the encoder's own preprocessor_config.json says. The encoder's authors used
PIL too; torchvision's resampling gives other pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dbtrain.errors import ConfigError, first_line
from dbtrain.models.load import A_HUB_ID, mind_the_network, quiet_libraries
from dbtrain.tiny import CLIP, EMBEDDED, IDENTITY

SHORT_SIDE_TYPES = ("CLIP", "Bit", "Convnext", "DINOv3")
"""Image processors that read a single number as `size` as the short side; all others read it as a square's side."""


@dataclass(frozen=True)
class Preprocess:
    """How pictures are prepared for an encoder: made RGB, resized, centre-cropped, scaled, normalized.

    resize: (height, width), or one number for the short side; None keeps the size. crop: (height, width); None crops
    nothing. resample: the number of PIL's filter.
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Iterable[Image.Image]) -> Tensor:
        """Normalized pixels [B, 3, H, W], float32."""
        return torch.stack([self._prepared(image) for image in images])

    def _prepared(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB")
        if self.resize is not None:
            image = image.resize(self._resized(image.size), Image.Resampling(self.resample))
        if self.crop is not None:
            image = _centre(image, self.crop)
        raw_HWC = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        pixels_CHW = raw_HWC.permute(2, 0, 1).float() * self.scale
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels_CHW - mean) / std

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of a picture of this (width, height) after resizing."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        assert self.resize is not None
        long_side = int(self.resize * max(size) / min(size))
        return (self.resize, long_side) if size[0] <= size[1] else (long_side, self.resize)


def _centre(image: Image.Image, crop: tuple[int, int]) -> Image.Image:
    """The middle of a picture; a crop that is larger than the picture is filled with black."""
    top, left = (image.height - crop[0]) // 2, (image.width - crop[1]) // 2
    return image.crop((left, top, left + crop[1], top + crop[0]))


def read_preprocess(source: str) -> Preprocess:
    """The preprocessing in an encoder's preprocessor_config.json; older forms of the file are read too."""
    config = _preprocessor_config(source)
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    resize = _size(config.get("size", 224), kind) if config.get("do_resize", True) else None
    crop = _size(config.get("crop_size", 224), "") if config.get("do_center_crop", False) else None
    scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
    plain = not config.get("do_normalize", True)
    mean = (0.0,) * 3 if plain else tuple(config.get("image_mean", (0.5,) * 3))
    std = (1.0,) * 3 if plain else tuple(config.get("image_std", (0.5,) * 3))
    if len(mean) != 3 or len(std) != 3 or isinstance(crop, int):
        raise ConfigError(f"{source}: preprocessor_config.json describes no RGB pictures (mean {mean}, crop {crop})")
    return Preprocess(resize, crop, int(config.get("resample", 2)), scale, mean, std)


def _preprocessor_config(source: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    try:
        path = cached_file(source, "preprocessor_config.json")
        return json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{source}: no readable preprocessor_config.json ({first_line(error)}); "
            f"give an image encoder's folder with that file, or {A_HUB_ID}"
        ) from error


def _size(size: Any, kind: str) -> tuple[int, int] | int:
    """A `size` entry as (height, width) or the short side. Raises ConfigError for other forms."""
    if isinstance(size, int):
        return size if kind.startswith(SHORT_SIDE_TYPES) else (size, size)
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    if isinstance(size, dict) and list(size) == ["shortest_edge"]:
        return int(size["shortest_edge"])
    raise ConfigError(
        f"preprocessor_config.json: size {size!r} is not known, want a number, height and width, or shortest_edge"
    )


@dataclass
class Encoder:
    """A loaded encoder. name: as reports show it. tokenizer: None for an encoder of pictures only."""

    name: str
    model: Any
    preprocess: Preprocess
    tokenizer: Any = None

    @property
    def vision(self) -> Any:
        """The part of the model that encodes pictures."""
        return getattr(self.model, "vision_model", self.model)

    @property
    def marks(self) -> int:
        """The number of tokens before the patches of a picture: [CLS], one of distillation, registers."""
        names = {name.rpartition(".")[2] for name, _ in self.vision.named_parameters()}
        single = len(names & {"cls_token", "class_embedding", "distillation_token"})
        return single + (getattr(self.vision.config, "num_register_tokens", 0) or 0)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image], batch: int = 64) -> Tensor:
        """Unit features [N, D] of pictures: the projected image embedding, or the last layer's [CLS]."""
        return self._unit([self._pixels(self.preprocess(images[i : i + batch])) for i in range(0, len(images), batch)])

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Unit features [N, D] of texts in the space of the pictures; longer texts are cut to the encoder's length."""
        if self.tokenizer is None:
            raise ConfigError(f"{self.name}: knows no texts; give a CLIP-style encoder")
        return self._unit([self._tokens(list(texts[i : i + batch])) for i in range(0, len(texts), batch)])

    def _pixels(self, pixels_BCHW: Tensor) -> Tensor:
        pixels_BCHW = pixels_BCHW.to(self.model.device, self.model.dtype)
        if self.tokenizer is not None:
            return _embedding(self.model.get_image_features(pixel_values=pixels_BCHW))
        states_BLD = self.model(pixel_values=pixels_BCHW).last_hidden_state
        if states_BLD.dim() != 3:
            raise ConfigError(f"{self.name}: gives maps of a picture instead of tokens; give a ViT, DINO or DINOv2")
        return states_BLD[:, 0]

    def _tokens(self, texts: list[str]) -> Tensor:
        longest = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        inputs = {key: tokens[key].to(self.model.device) for key in ("input_ids", "attention_mask") if key in tokens}
        return _embedding(self.model.get_text_features(**inputs))

    def _unit(self, parts: list[Tensor]) -> Tensor:
        features_ND = torch.cat(parts).float().cpu() if parts else torch.zeros(0, 1)
        if not features_ND.isfinite().all():
            raise ConfigError(f"{self.name}: gives features that are not finite; its weights are damaged or overflow")
        return torch.nn.functional.normalize(features_ND, dim=-1)


def load_pair(source: str = EMBEDDED, device: str = "cpu") -> Encoder:
    """A CLIP-style encoder of pictures and texts: CLIP-I, CLIP-T and zero-shot accuracy."""
    encoder = _load(source, CLIP, device)
    if encoder.tokenizer is None:
        kind = type(encoder.model).__name__
        raise ConfigError(f"{source}: is a {kind}, which has no text side; give a CLIP-style encoder")
    return encoder


def load_identity(source: str = EMBEDDED, device: str = "cpu") -> Encoder:
    """The encoder that distinguishes one dog from another: DINO's role (`facebook/dino-vits16` in the paper)."""
    encoder = _load(source, IDENTITY, device)
    if encoder.tokenizer is None and not encoder.marks:
        kind = type(encoder.model).__name__
        raise ConfigError(
            f"{source}: is a {kind}, which has no [CLS] token that stands for a picture; "
            "give a ViT, DINO, DINOv2 or CLIP-style encoder"
        )
    return encoder


def _load(source: str, embedded: Path, device: str) -> Encoder:
    """An encoder in fp32 and evaluation mode. No code that comes with it is run, and no pickle is opened."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    quiet_libraries()
    path = str(embedded) if source == EMBEDDED else source
    mind_the_network(path)
    preprocess = read_preprocess(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        # No feature uses the pooler. transformers draws a pooler that the file lacks at random, with a warning.
        pooler = {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}
        safe: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
        model, loading = AutoModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **safe, **pooler
        )
        has_texts = hasattr(model, "get_text_features")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False) if has_texts else None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{source}: cannot be loaded as an encoder ({first_line(error)}); "
            f"give a transformers folder with safetensors weights, {A_HUB_ID}, or `embedded`"
        ) from error
    # transformers draws missing weights at random; scores would be meaningless.
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ConfigError(
            f"{source}: its file lacks {len(missing)} weights of a {type(model).__name__} (such as {missing[0]}); "
            "give a complete encoder"
        )
    name = f"{EMBEDDED}/{embedded.name}" if source == EMBEDDED else source
    return Encoder(name, model.to(device).eval().requires_grad_(False), preprocess, tokenizer)


def _embedding(output: Any) -> Tensor:
    """The projected embedding: transformers 5 wraps it in an output object, transformers 4 returns it."""
    return getattr(output, "pooler_output", output)
