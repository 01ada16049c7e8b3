"""Adapters of any trainer, told from their names: diffusers' of all ages, PEFT's, kohya's, ComfyUI's own.

The name of a tensor is the name of a layer, and behind it what the tensor is to the layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dbtrain.errors import DataError, named
from dbtrain.models.adapters import LoraWeights
from dbtrain.models.stability_names import from_stability

KINDS = {
    r"\.lora_A(?:\.[A-Za-z0-9_-]+)?\.weight": "down",  # PEFT, with the adapter's name or without
    r"\.lora_B(?:\.[A-Za-z0-9_-]+)?\.weight": "up",
    r"\.lora_down\.weight": "down",  # kohya
    r"\.lora_up\.weight": "up",
    r"\.lora\.down\.weight": "down",  # diffusers 0.22 to 0.2x
    r"\.lora\.up\.weight": "up",
    r"\.lora_linear_layer\.down\.weight": "down",
    r"\.lora_linear_layer\.up\.weight": "up",
    r"_lora\.down\.weight": "down",  # diffusers' attention processors
    r"_lora\.up\.weight": "up",
    r"\.alpha": "alpha",
}
"""What a tensor is, by the end of its name."""
OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoRA with a third matrix",
    "lora_embedding": "a trained embedding",
    ".diff": "differences of whole weights",
    "bundle_emb": "textual inversion",
}
"""Methods other than plain LoRA, by a part of their names."""
COMPONENTS = {
    "unet.": "unet",
    "transformer.": "transformer",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",  # ComfyUI
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
"""Components by the beginnings of dotted names."""
UNDERSCORED = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
"""Components by the beginnings of names whose dots are underscores."""
WORDS = sorted(
    """down_blocks up_blocks mid_block attentions resnets transformer_blocks downsamplers upsamplers attn1 attn2 to_q
    to_k to_v to_out proj_in proj_out ff net proj time_emb_proj conv_shortcut conv1 conv2 conv_in conv_out conv
    time_embedding add_embedding linear_1 linear_2 text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp
    fc1 fc2 input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op time_embed
    label_emb out""".split(),
    key=len,
    reverse=True,
)
"""Parts of layers' paths that may hold an underscore themselves, the longest first."""
PART = re.compile(rf"({'|'.join(WORDS)}|\d+)(?:_|$)")
BARE = {r"(down_blocks|mid_block|up_blocks)\.": "unet", r"(text_model|encoder\.layers)\.": "text_encoder",
        r"(single_)?transformer_blocks\.": "transformer"}  # fmt: skip
"""Components by the beginnings of paths that name none, as PEFT and old diffusers write them."""


@dataclass
class _Layer:
    """What was found of a layer."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def scale(self, alpha: float | None) -> float:
        """alpha / rank; alpha None is the file's own, or else the rank."""
        rank = len(self.tensors["down"])
        if "alpha" in self.tensors:
            return float(self.tensors["alpha"]) / rank
        return 1.0 if alpha is None else alpha / rank


def read_state(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LoraWeights:
    """The adapter in a file of any of these trainers. Raises DataError, with the name, for what is not understood.

    settings: PEFT's of each component (`unet.lora_alpha`), or of all (`lora_alpha`); may be empty.
    """
    found: dict[tuple[str, str], _Layer] = {}
    for name in sorted(state):
        layer, kind = _taken_apart(name)
        tensors = found.setdefault(place_of(layer), _Layer()).tensors
        if kind in tensors:
            raise DataError(f"{named(name)}: a second adapter for the same layer; give a file with one")
        tensors[kind] = state[name]
    scales: dict[tuple[str, str], float] = {}
    for (component, path), parts in found.items():
        _refuse_broken(f"{component}.{path}", parts.tensors)
        scales[component, path] = parts.scale(_alpha(settings, component, path, len(parts.tensors["down"])))
    return _gathered(found, scales)


def _gathered(found: Mapping[tuple[str, str], _Layer], scales: Mapping[tuple[str, str], float]) -> LoraWeights:
    """One adapter of all layers. Where their scales differ, each is multiplied into its own B."""
    if not found:
        raise DataError("holds no adapter; give a file with LoRA matrices")
    rank = max(len(layer.tensors["down"]) for layer in found.values())
    scale = next(iter(scales.values()))
    equal = all(other == scale for other in scales.values())
    matrices: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    conv = set()
    for (component, path), layer in found.items():
        down, up = layer.tensors["down"], layer.tensors["up"]
        if down.dim() == 4:
            conv.add(f"{component}.{path}")
        up_DR = up.flatten(1).float()
        factor = 1.0 if equal else scales[component, path]
        pair = down.flatten(1).float(), up_DR if factor == 1 else up_DR * factor
        matrices.setdefault(component, {})[path] = pair
    return LoraWeights(matrices, scale * rank if equal else float(rank), rank, frozenset(conv))


def _taken_apart(name: str) -> tuple[str, str]:
    """(layer, kind) of a tensor."""
    for part, method in OTHERS.items():
        if part in name:
            raise DataError(f"{named(name)}: is {method}, and only plain LoRA is read")
    for end, kind in KINDS.items():
        match = re.fullmatch(rf"(.+?){end}", name)
        if match:
            return match[1], kind
    raise DataError(f"{named(name)}: is no adapter's name; give a LoRA of diffusers, PEFT, kohya or ComfyUI")


def place_of(layer: str) -> tuple[str, str]:
    """(component, diffusers' path) of a layer by the name that its trainer gave it."""
    name = layer.removeprefix("base_model.model.")
    for start, component in COMPONENTS.items():
        if name.startswith(start):
            return component, _diffusers_path(name.removeprefix(start))
    if re.match(r"diffusion_model\.(input_blocks|output_blocks|middle_block|time_embed|label_emb|out)\.", name):
        return "unet", _diffusers_path(name.removeprefix("diffusion_model."))
    for start, component in UNDERSCORED.items():
        if name.startswith(start):
            return component, _diffusers_path(_dotted(layer, name.removeprefix(start)))
    for start, component in BARE.items():
        if re.match(start, name):
            return component, _diffusers_path(name)
    raise _unknown(layer)


def _dotted(layer: str, text: str) -> str:
    """A path out of underscores alone."""
    parts, at = [], 0
    while at < len(text):
        match = PART.match(text, at)
        if match is None:
            raise _unknown(layer)
        parts.append(match[1])
        at = match.end()
    return ".".join(parts)


def _diffusers_path(path: str) -> str:
    """The path as the models of diffusers have it."""
    path = path.replace(".processor.to_", ".to_")
    if not path.startswith("single_"):  # FLUX.2's single blocks have one layer of that name
        path = re.sub(r"\.to_out$", ".to_out.0", path)
    if re.match(r"(input_blocks|output_blocks|middle_block|time_embed|label_emb|out)\.", path):
        try:
            return from_stability(path)
        except (KeyError, StopIteration, IndexError):
            raise _unknown(path) from None
    return path


def _unknown(layer: str) -> DataError:
    known = "a U-Net, a CLIP text encoder or FLUX; other transformers are read in diffusers' names"
    return DataError(f"{named(layer)}: is the name of no layer of {known}")


def _refuse_broken(layer: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise DataError unless a layer has both matrices, of one rank, of a linear layer or a 1x1 convolution."""
    missing = [kind for kind in ("down", "up") if kind not in tensors]
    if missing:
        raise DataError(f"{named(layer)}: has no `{missing[0]}` matrix; the file is not whole")
    down, up = tensors["down"], tensors["up"]
    if down.dim() not in (2, 4) or up.dim() != down.dim():
        raise DataError(f"{named(layer)}: matrices of {down.dim()} and {up.dim()} dimensions, want 2 or 4 of both")
    if down.dim() == 4 and (down.shape[2:] != (1, 1) or up.shape[2:] != (1, 1)):
        size = "x".join(map(str, down.shape[2:]))
        raise DataError(f"{named(layer)}: adapts a {size} convolution; only linear layers and 1x1 ones are read")
    if not len(down) or up.shape[1] != len(down):
        raise DataError(f"{named(layer)}: matrices of the ranks {len(down)} and {up.shape[1]}, want one rank")


def _alpha(settings: Mapping[str, Any], component: str, path: str, rank: int) -> float | None:
    """Alpha of a layer in PEFT's settings; None where they hold none."""

    def setting(key: str) -> Any:
        return settings.get(f"{component}.{key}", settings.get(key))

    if setting("use_dora"):
        raise DataError("is DoRA, and only plain LoRA is read")
    alpha = setting("lora_alpha")
    for pattern, value in (setting("alpha_pattern") or {}).items():
        if path == pattern or path.endswith(f".{pattern}"):
            alpha = value
    if alpha is None:
        return None
    return float(alpha) * rank**0.5 if setting("use_rslora") else float(alpha)


def told_families(weights: LoraWeights) -> set[str]:
    """Families whose denoiser has all layers of an adapter; several if its names tell nothing."""
    if "transformer" in weights.matrices:
        single = [path for path in weights.matrices["transformer"] if path.startswith("single_")]
        klein = any(path.endswith(("attn.to_qkv_mlp_proj", "attn.to_out")) for path in single)
        second, others = {"flux2", "flux2_klein"}, {"sd3", "flux", "qwen_image"}
        return second if klein else {"flux"} if single else second | others
    if "text_encoder_2" in weights.matrices:
        return {"sdxl"}
    families = {"sd", "sdxl"}
    for path, (down, _) in weights.matrices.get("unet", {}).items():
        if re.match(r"down_blocks\.(0\.attentions|3)\.|up_blocks\.([23]\.attentions|3)\.", path):
            families &= {"sd"}
        if re.search(r"^up_blocks\.0\.attentions|\.transformer_blocks\.[1-9]|^add_embedding", path):
            families &= {"sdxl"}
        if path.endswith(("attn2.to_k", "attn2.to_v")) and down.shape[1] in (768, 1024, 2048):
            families &= {"sdxl"} if down.shape[1] == 2048 else {"sd"}
    return families
