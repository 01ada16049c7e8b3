"""What older transformers and diffusers need in a folder of a whole model, added after today's libraries wrote it.

transformers 5.0 stopped writing CLIP's `vocab.json` and `merges.txt`, without which a version below 5.0 opens no CLIP
tokenizer. transformers 5.6 shortened the names in a CLIPTextModel by `text_model.`; versions below it find no weight
under the short names, and go on with random ones. transformers 5 writes T5's and Qwen's tokenizers under the names that
belonged to their slow forms, which below it open no `tokenizer.json`; and lists special tokens under a key that held a
mapping before. All versions read the old forms.
"""

import json
from pathlib import Path

from dbtrain.storage.atomic import write_file

PREFIX = "text_model."
FAST = {"T5Tokenizer": ("T5TokenizerFast", "spiece.model"), "Qwen2Tokenizer": ("Qwen2TokenizerFast", "vocab.json")}
"""Names of fast tokenizers in all versions, and the file that the slow ones cannot do without."""


def suit_older_programs(folder: Path) -> None:
    """Rewrite a diffusers folder, which nothing else uses yet, so that older programs read it too."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (part / "tokenizer.json").is_file():
            write_clip_vocabulary(part)
            rename_special_tokens(part)
        if part.name.startswith("text_encoder"):
            lengthen_names(part)
    name_fast_tokenizers(folder)


def rename_special_tokens(folder: Path) -> None:
    """Give a tokenizer's list of further special tokens the key that it has in all versions; an empty one goes."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    if not isinstance(settings.get("extra_special_tokens"), list):
        return
    if tokens := settings.pop("extra_special_tokens"):
        settings["additional_special_tokens"] = tokens
    write_file(path, json.dumps(settings, indent=2).encode())


def name_fast_tokenizers(folder: Path) -> None:
    """Call tokenizers in the index by their fast names, where the folder has no file of the slow ones."""
    path = folder / "model_index.json"
    if not path.is_file():
        return
    index = json.loads(path.read_text("utf-8"))
    for part, kind in index.items():
        name, needed = FAST.get(kind[1] if isinstance(kind, list) else "", ("", ""))
        if name and (folder / part / "tokenizer.json").is_file() and not (folder / part / needed).exists():
            index[part] = [kind[0], name]
    write_file(path, json.dumps(index, indent=2).encode())


def write_clip_vocabulary(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` of a CLIP tokenizer out of its `tokenizer.json`; leave other kinds alone."""
    kind = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("tokenizer_class")
    if kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        return
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    write_file(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False).encode())
    write_file(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())


def lengthen_names(folder: Path) -> None:
    """Give the weights of a CLIPTextModel their names of transformers below 5.6; leave other classes alone."""
    from safetensors.torch import load_file, save_file

    if json.loads((folder / "config.json").read_text("utf-8")).get("architectures") != ["CLIPTextModel"]:
        return
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if any(not name.startswith(PREFIX) for name in tensors):
            save_file({_long(name): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text("utf-8"))
        index["weight_map"] = {_long(name): file for name, file in index["weight_map"].items()}
        write_file(path, json.dumps(index, indent=2).encode())


def _long(name: str) -> str:
    return name if name.startswith(PREFIX) else PREFIX + name
