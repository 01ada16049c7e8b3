"""The model card of a finished subject, its resolved recipe, and the code that a user copies to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dbtrain import __version__
from dbtrain.families import FAMILIES
from dbtrain.results.record import SHEET
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import write_file
from dbtrain.tiny import BASE, NAMED

FIXED = "variance_type='fixed_small'"
OLDEST, NEWEST = "0.33.1", "0.42.1"
TESTED = {**dict.fromkeys(("sd", "sdxl", "sd3", "flux"), (OLDEST, NEWEST)), "flux2_klein": ("0.37.1", NEWEST)}
"""Oldest and newest diffusers that `make compat` loads results with, by family."""
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
    if between := TESTED.get(record.get("family", "sd")):
        versions = f"diffusers {' to '.join(between)} and the transformers and PEFT of their day"
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

    record: {"base", "family", "method", "caption"}, and "stages" of those that enlarge. Its texts may come from anyone,
    so the code holds them as literals.
    """
    caption = f"prompt={str(record.get('caption'))!r}"
    first, *then = [_load(record, "pipe", folder)] + [
        _load(stage, f"upscaler{number or ''}", f"{folder}/{stage.get('folder')}")
        for number, stage in enumerate(_stages(record))
    ]
    imports = dict.fromkeys(line for part in (first, *then) for line in part.imports)
    lines = [*imports, "", *first.lines]
    if first.told:
        given = f"image=Image.open('small.png'){_enlarged(record)}, " if "level" in record else ""
        lines += [f"image = pipe({caption}, {given}{first.told}).images[0]"]
    elif then:
        lines += [f"image = pipe({caption}).images[0]"]
    for part, stage in zip(then, _stages(record), strict=True):
        given = f"image=image{_enlarged(stage)}"
        lines += [*part.lines, f"image = {part.name}({caption}, {given}, {part.told}).images[0]"]
    if first.told or then:
        return "\n".join([*lines, f"image.save({image!r})"])
    return "\n".join([*lines, f"pipe({caption}).images[0].save({image!r})"])


def _enlarged(record: Mapping[str, Any]) -> str:
    """What enlarges a picture for a pipeline that must be given it in the large size; PIL's default is bicubic."""
    side = record.get("enlarged_to")
    return f".resize(({side}, {side}))" if isinstance(side, int) else ""


class Loaded(NamedTuple):
    """Code that makes a pipeline of a name, and what its call is told beside the prompt."""

    name: str
    imports: list[str]
    lines: list[str]
    told: str


def _stages(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The stages in a record, which may come from anyone."""
    stages = record.get("stages")
    return [stage for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []


def _load(record: Mapping[str, Any], name: str, folder: str) -> Loaded:
    base, kind = str(record.get("base")), "DiffusionPipeline"
    imports: list[str] = []
    source = f"{kind}.from_pretrained({base!r})"
    if record.get("method") == "full":
        source = f"{kind}.from_pretrained({folder + '/model'!r})"
    elif base in NAMED:
        shipped = "BASE" if NAMED[base] == BASE else "UPSCALER"
        imports = [f"from dbtrain.tiny import {shipped}"]
        source = f"{kind}.from_pretrained({shipped}, safety_checker=None)"
    elif base.endswith(".safetensors"):
        family = FAMILIES.get(str(record.get("family")))
        kind = family.pipeline if family else kind
        source = f"{kind}.from_single_file({base!r})"
    lines = [f"{name} = {source}"]
    lines += [] if record.get("method") == "full" else [f"{name}.load_lora_weights({folder!r})"]
    told = []
    if "level" in record:
        imports += ["from PIL import Image"] if name == "pipe" else []
        told.append(f"noise_level={record['level'] if isinstance(record['level'], int) else 0}")
    if str(record.get("family")).startswith("if_"):
        # What was trained is the mean alone; and cleaning would take identifiers out of the prompt.
        lines.append(f"{name}.scheduler = {name}.scheduler.from_config({name}.scheduler.config, {FIXED})")
        told.append("clean_caption=False")
    return Loaded(name, [f"from diffusers import {kind}", *imports], lines, ", ".join(told))
