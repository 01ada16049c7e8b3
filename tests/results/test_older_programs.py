"""Files that older transformers need in a whole model; `make compat` has the programs themselves read them."""

import json
import shutil

from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import CLIPTextModel

from dbtrain.results.older_programs import suit_older_programs


def names(path):
    with safe_open(path, "pt") as opened:
        return list(opened.keys())


def test_a_folder_gets_the_long_names_and_the_two_files_of_a_tokenizer(model_folders, tmp_path):
    sdxl_folder = model_folders["sdxl"]
    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    suit_older_programs(folder)
    for part in ("tokenizer", "tokenizer_2"):
        new = BPE.from_file(str(folder / part / "vocab.json"), str(folder / part / "merges.txt"))
        held = json.loads((folder / part / "tokenizer.json").read_text())["model"]
        assert Tokenizer(new).get_vocab() == held["vocab"]
        assert len((folder / part / "merges.txt").read_text().splitlines()) == 1 + len(held["merges"])
    for part in ("text_encoder", "text_encoder_2"):
        got = names(folder / part / "model.safetensors")
        assert all(name.startswith(("text_model.", "text_projection.")) for name in got)
    model, seen = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not seen["missing_keys"] and not seen["unexpected_keys"]
    before = CLIPTextModel.from_pretrained(sdxl_folder / "text_encoder").state_dict()
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


def test_parts_of_other_kinds_stay_as_they_are(tmp_path):
    for part, files in {
        "tokenizer": {"tokenizer.json": {"model": {}}, "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}},
        "text_encoder": {"config.json": {"architectures": ["T5EncoderModel"]}},
    }.items():
        (tmp_path / part).mkdir()
        for name, content in files.items():
            (tmp_path / part / name).write_text(json.dumps(content))
    suit_older_programs(tmp_path)
    held = sorted(path.name for path in tmp_path.rglob("*.*"))
    assert held == ["config.json", "tokenizer.json", "tokenizer_config.json"]
