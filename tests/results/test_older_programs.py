"""Files that older transformers need in a whole model; `make compat` has the programs themselves read them."""

import json
import shutil

import pytest
import transformers
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


@pytest.mark.parametrize("family, part, name", [("sd3", "tokenizer_3", "T5"), ("flux2_klein", "tokenizer", "Qwen2")])
@pytest.mark.parametrize("slow", [False, True])
def test_tokenizers_have_the_names_that_open_tokenizer_json_everywhere(
    model_folders, tmp_path, family, part, name, slow
):
    folder, before = tmp_path / "model", json.loads((model_folders[family] / "model_index.json").read_text())
    folder.mkdir()
    shutil.copy(model_folders[family] / "model_index.json", folder)
    shutil.copytree(model_folders[family] / part, folder / part)
    if slow:
        (folder / part / {"T5": "spiece.model", "Qwen2": "vocab.json"}[name]).write_text("{}")
    suit_older_programs(folder)
    after = json.loads((folder / "model_index.json").read_text())
    assert before[part][1] == f"{name}Tokenizer" and hasattr(transformers, f"{name}TokenizerFast")
    assert after == {**before, part: ["transformers", f"{name}Tokenizer{'' if slow else 'Fast'}"]}


@pytest.mark.parametrize("tokens", [[], ["<|im_start|>"], {"image_token": "<image>"}, None])
def test_lists_of_special_tokens_have_the_key_of_all_versions(tmp_path, tokens):
    """transformers below 5 fails at a list under the key of a mapping; a mapping and nothing are right in all."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    settings = {"tokenizer_class": "T5Tokenizer", **({} if tokens is None else {"extra_special_tokens": tokens})}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    suit_older_programs(tmp_path)
    got = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    listed = {"additional_special_tokens": tokens} if isinstance(tokens, list) and tokens else {}
    kept = {"extra_special_tokens": tokens} if isinstance(tokens, dict) else {}
    assert got == {"tokenizer_class": "T5Tokenizer", **listed, **kept}


def test_list_keys_are_read_back_as_the_same_tokens(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["flux2_klein"] / "tokenizer", tmp_path / "model" / "tokenizer")
    before = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    suit_older_programs(tmp_path / "model")
    after = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    text = "<|im_start|>a dog<|im_end|>"
    assert after(text).input_ids == before(text).input_ids and after.all_special_tokens == before.all_special_tokens


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
