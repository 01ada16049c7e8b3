"""What a user copies to load a finished subject in diffusers; the model card and the report show the same."""

from collections.abc import Mapping
from typing import Any

from dbtrain.families import FAMILIES
from dbtrain.tiny import EMBEDDED


def python_snippet(record: Mapping[str, Any], folder: str, image: str) -> str:
    """Code that loads a subject from `folder` and saves a picture of its caption as `image`.

    record: {"base", "family", "method", "caption"}, texts from anywhere: each stands in the code as a literal.
    """
    base, kind = str(record.get("base")), "DiffusionPipeline"
    imports, source = [], f"{kind}.from_pretrained({base!r})"
    if record.get("method") == "full":
        source = f"{kind}.from_pretrained({folder + '/model'!r})"
    elif base == EMBEDDED:
        imports, source = ["from dbtrain.tiny import BASE"], f"{kind}.from_pretrained(BASE, safety_checker=None)"
    elif base.endswith(".safetensors"):
        family = FAMILIES.get(str(record.get("family")))
        kind = family.pipeline if family else kind
        source = f"{kind}.from_single_file({base!r})"
    lora = [] if record.get("method") == "full" else [f"pipe.load_lora_weights({folder!r})"]
    caption = str(record.get("caption"))
    lines = [f"from diffusers import {kind}", *imports, "", f"pipe = {source}", *lora]
    return "\n".join([*lines, f"pipe({caption!r}).images[0].save({image!r})"])
