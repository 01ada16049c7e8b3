"""The model card of a finished subject, its resolved recipe, and the code that a user copies to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dbtrain import __version__
from dbtrain.families import FAMILIES
from dbtrain.results.record import SHEET
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import write_file
from dbtrain.tiny import EMBEDDED

TESTED = ("0.33.1", "0.42.1")
"""Oldest and newest diffusers that `make compat` loads results with."""
TESTED_FAMILIES = ("sd", "sdxl")
"""Families whose results it loads."""
CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONFIG_FILE = "config.yaml"


def publish_card(folder: Path, record: dict[str, Any], config: RunConfig, recipe_yaml: str) -> None:
    """Write README.md, a model card with usage, recipe and provenance, and config.yaml. Hubs index its front matter."""
    write_file(folder / CONFIG_FILE, recipe_yaml.encode())
    lora = config.train.method == "lora"
    # Hubs refuse a card whose base is no model of theirs.
    base = {"base_model": record["base"]} if HUB_ID.fullmatch(record["base"]) else {}
    front = yaml.safe_dump(
        {
            **base,
            "library_name": "diffusers",
            "instance_prompt": record["caption"],
            "tags": ["text-to-image", "dreambooth", "dbtrain", *(["lora"] if lora else [])],
        },
        sort_keys=False,
        allow_unicode=True,
    )
    sheet = f"![samples]({SHEET})\n\n" if (folder / SHEET).exists() else ""
    rows = "\n".join(
        f"| {key} | `{_cell(record[key])}` |"
        for key in ("identifier", "class", "steps", "seed", "base", "base_digest", "data_digest", "run", "dbtrain")
    )
    tested = ""
    if record.get("family", "sd") in TESTED_FAMILIES:
        versions = f"diffusers {TESTED[0]} to {TESTED[1]} and the transformers and PEFT of their day"
        tested = f"Such results are tested with {versions}.\n\n"
    write_file(
        folder / CARD,
        f"""---
{front}---

# {_cell(record["subject"])}: {_cell(record["class"])}

`{_cell(record["identifier"])} {_cell(record["class"])}` names this subject.
Trained with dbtrain {__version__} (DreamBooth, arXiv 2208.12242).

{sheet}```python
{python_snippet({**record, "method": config.train.method}, ".", "sample.png")}
```

{tested}| | |
|---|---|
{rows}

## Recipe

```yaml
{recipe_yaml}```
""".encode(),
    )


def _cell(value: object) -> str:
    """A value made safe for a Markdown table or heading."""
    return str(value).replace("|", "\\|").replace("`", "'").replace("\n", " ").replace("<", "&lt;")


def python_snippet(record: Mapping[str, Any], folder: str, image: str) -> str:
    """Code that loads a subject from `folder` and saves a picture of its caption as `image`.

    record: {"base", "family", "method", "caption"}. Its texts may come from anyone, so the code holds them as literals.
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
    return "\n".join([*lines, f"pipe(prompt={caption!r}).images[0].save({image!r})"])
