"""Metadata of an adapter in kohya's layout: what A1111, Forge, ComfyUI and kohya's own scripts decide by and show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from dbtrain.models.adapters import LoraWeights
from dbtrain.models.family import Family

SD2_WIDTH = 1024
"""Features of a caption's states in Stable Diffusion 2.x, which A1111 tells from 1.x by `ss_v2`."""


def kohya_metadata(
    tensors: dict[str, Tensor], weights: LoraWeights, family: Family, provenance: Mapping[str, str], name: str
) -> dict[str, str]:
    """`ss_*` and `sshs_*` of tensors with kohya's names.

    A1111 and Forge hide an adapter beside bases of another `ss_base_model_version`, show it as `ss_output_name`, and
    count the words of `ss_tag_frequency` as its trigger words. name: what the adapter is to be called.
    """
    is_sd2 = family.base_version == "sd_v1" and caption_width(weights) == SD2_WIDTH
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(weights.rank),
        "ss_network_alpha": str(weights.alpha),
        "ss_base_model_version": "sd_v2" if is_sd2 else family.base_version,
        "ss_v2": str(is_sd2),
        "ss_output_name": name,
    }
    if "identifier" in provenance and "class" in provenance:
        words = f"{provenance['identifier']} {provenance['class']}"
        metadata["ss_tag_frequency"] = json.dumps({words: {words: 1}})
    return metadata | hashes(tensors, metadata)


def caption_width(weights: LoraWeights) -> int | None:
    """Features of a caption's states, as the layers that read them show; None without such a layer."""
    found = (
        down.shape[1]
        for component, matrices in weights.matrices.items()
        for path, (down, _) in matrices.items()
        if not component.startswith("text_encoder") and path.endswith(("attn2.to_k", "attn2.to_v"))
    )
    return next(found, None)


def hashes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """kohya's two hashes of an adapter, by which A1111 knows a file again whatever its name and other metadata are.

    The first is the sha256 of all behind the header, the second eight digits of 64 KiB at 1 MiB (both as in
    `precalculate_safetensors_hashes` of sd-scripts).
    """
    from safetensors.torch import save

    content = save(tensors, metadata)
    behind = 8 + int.from_bytes(content[:8], "little")
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(content[behind:]).hexdigest(), "sshs_legacy_hash": legacy}
