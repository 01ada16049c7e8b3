"""What a finished subject leaves behind: weights in the field's formats, a model card and samples.

The record that says so is written last, by `record.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from dbtrain import __version__
from dbtrain.adapters import LoraWeights, to_diffusers, to_kohya
from dbtrain.atomic import write_file
from dbtrain.config import RunConfig
from dbtrain.errors import DataError
from dbtrain.record import SHEET, refuse_changed
from dbtrain.snippets import python_snippet

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"
MODEL_FOLDER = "model"
CARD = "README.md"
CONFIG_FILE = "config.yaml"


def save_safetensors(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Write tensors with string metadata, whole or not at all."""
    from safetensors.torch import save

    write_file(path, _in_order(save(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library's order changes by process, and digests with it."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def publish_lora(folder: Path, weights: LoraWeights, provenance: dict[str, str], kohya: bool) -> list[Path]:
    """The adapter files written: diffusers' layout, and kohya's if asked."""
    config = {
        f"{component}.{key}": value
        for component, matrices in weights.matrices.items()
        for key, value in {"r": weights.rank, "lora_alpha": weights.alpha, "target_modules": sorted(matrices)}.items()
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True), **provenance}
    save_safetensors(folder / LORA_FILE, to_diffusers(weights), metadata)
    written = [folder / LORA_FILE]
    if kohya:
        written.append(export_kohya(folder / KOHYA_FILE, weights, provenance))
    return written


def export_kohya(path: Path, weights: LoraWeights, provenance: dict[str, str]) -> Path:
    """The adapter written with kohya's key names and `ss_*` metadata."""
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(weights.rank),
        "ss_network_alpha": str(weights.alpha),
        **provenance,
    }
    save_safetensors(path, to_kohya(weights, provenance.get("family", "sd")), metadata)
    return path


def read_lora(path: Path) -> tuple[LoraWeights, dict[str, str]]:
    """An adapter that dbtrain published (a file, or the folder that holds it), and its metadata.

    Raises DataError for a file that is none, and for one that is not what the record beside it says.
    """
    from safetensors import safe_open

    from dbtrain.adapters import from_diffusers

    file = path / LORA_FILE if path.is_dir() else path
    refuse_changed(file)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except Exception as error:
        raise DataError(
            f"{file}: cannot be read as an adapter ({error}); give a folder or file that `dbtrain train` wrote"
        ) from error
    if not any(name.endswith(".lora_A.weight") for name in state):
        raise DataError(f"{file}: holds no adapter with diffusers' names; give the file that `dbtrain train` wrote")
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        alpha = next((float(value) for key, value in settings.items() if key.endswith(".lora_alpha")), None)
        return from_diffusers(state, alpha), metadata
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: is no adapter of diffusers' layout ({error!r}); train it again") from error


def grid(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str] | None = None, cell: int | None = None
) -> Image.Image:
    """One sheet of image rows on white, each row under its caption; `cell` is the side of an image in pixels."""
    cell = cell or rows[0][0].width
    gap, header = 4, 16 if captions else 0
    width = max(len(row) for row in rows) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, len(rows) * (cell + gap + header) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = gap + i * (cell + gap + header)
        if captions:
            pen.text((gap, top + 1), captions[i][: width // 6], fill="black")
        for j, image in enumerate(row):
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (gap + j * (cell + gap), top + header))
    return sheet


def publish_card(folder: Path, record: dict[str, Any], config: RunConfig, recipe_yaml: str) -> None:
    """README.md, a model card with usage, recipe and provenance, and config.yaml; hubs index the front matter."""
    write_file(folder / CONFIG_FILE, recipe_yaml.encode())
    lora = config.train.method == "lora"
    front = yaml.safe_dump(
        {
            "base_model": record["base"],
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

| | |
|---|---|
{rows}

## Recipe

```yaml
{recipe_yaml}```
""".encode(),
    )


def publish_sheet(folder: Path, rows: Sequence[Sequence[Image.Image]], prompts: Sequence[str], name: str) -> Path:
    """A captioned sheet `name`.png of sample images, and each alone in `samples/name`, which holds nothing else."""
    separate = folder / "samples" / name
    separate.mkdir(parents=True, exist_ok=True)
    before = set(separate.glob("prompt-*-image-*.png"))
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            single = separate / f"prompt-{i:02d}-image-{j:02d}.png"
            save_png(single, image)
            before.discard(single)
    for single in before:
        single.unlink()
    path = folder / f"{name}.png"
    save_png(path, grid(rows, prompts, cell=max(128, rows[0][0].width)))
    return path


def save_png(path: Path, image: Image.Image) -> None:
    """Write an image, whole or not at all."""
    write_file(path, lambda file: image.save(file, "PNG"))


def _cell(value: object) -> str:
    """A value made safe for a Markdown table or heading."""
    return str(value).replace("|", "\\|").replace("`", "'").replace("\n", " ").replace("<", "&lt;")
