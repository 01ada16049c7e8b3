"""Model families: one file an architecture, and a row in this table.

A file holds what dbtrain knows of its architecture alone. What several share is in `flow.py` and `dbtrain.models.unet`.
"""

from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import Any


class Rows(Mapping[str, Any]):
    """The rows of a table by name. A row is given as `module:name` of this package and loaded when it is looked up, so
    that the names alone can be read without loading torch or diffusers."""

    def __init__(self, places: Mapping[str, str]):
        self.places = dict(places)

    def __getitem__(self, name: str) -> Any:
        return resolve_name(f"{__name__}.{self.places[name]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


FAMILIES = Rows(
    {
        "sd": "sd:SD",
        "sdxl": "sdxl:SDXL",
        "playground": "playground:PLAYGROUND",
        "sd3": "sd3:SD3",
        "flux": "flux:FLUX",
        "flux2_klein": "flux2_klein:FLUX2_KLEIN",
        "flux2": "flux2:FLUX2",
        "zimage": "zimage:ZIMAGE",
        "qwen_image": "qwen_image:QWEN_IMAGE",
        "krea2": "krea2:KREA2",
        "if_stage1": "deepfloyd:IF_STAGE1",
        "if_stage2": "deepfloyd:IF_STAGE2",
        "x4_upscaler": "upscaler:X4_UPSCALER",
        "chroma": "chroma:CHROMA",
        "lumina2": "lumina2:LUMINA2",
        "sana": "sana:SANA",
        "ideogram4": "ideogram4:IDEOGRAM4",
    }
)
"""A `models.family.Family` for each architecture, by the name used in `model.family`."""
