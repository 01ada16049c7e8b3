"""What a base's small files tell: one line before any work."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbtrain.errors import ConfigError, DataError
from dbtrain.families import FAMILIES
from dbtrain.models.base_check import REFUSED, base_problem, marks_of, path_problem, read_header, weights_problem
from dbtrain.models.load import load_models, marked, refuse_base
from dbtrain.models.single_file import checkpoint_of
from dbtrain.settings.config import ModelConfig

UNETS = ("sd", "sdxl")


@pytest.fixture(scope="module")
def single_files(model_folders, tmp_path_factory):
    """The random models as single files, by family."""
    folder = tmp_path_factory.mktemp("single")
    for name in UNETS:
        tensors = {key: tensor.contiguous() for key, tensor in checkpoint_of(model_folders[name], name).items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in UNETS}


@pytest.fixture
def copy(model_folders, tmp_path):
    return shutil.copytree(model_folders["sd"], tmp_path / "base")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("is_single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_a_base_of_another_family_is_told_and_its_own_is_not(base, is_single, model_folders, single_files):
    source = str(single_files[base] if is_single else model_folders[base])
    other = {"sd": "sdxl", "sdxl": "sd"}[base]
    assert base_problem(FAMILIES[base], source) is None
    assert f"no base of model.family={other}" in base_problem(FAMILIES[other], source)
    with pytest.raises(ConfigError, match=f"^model.path: .* no base of model.family={other}") as raised:
        load_models(FAMILIES[other], ModelConfig(family=other, path=source))
    assert len(raised.value.findings) == len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("channels, kind", [(9, "an inpainting model"), (8, "edits pictures"), (5, "a depth model"),
                                            (7, "another kind of model")])  # fmt: skip
def test_models_that_take_more_than_latents(copy, single_files, tmp_path, channels, kind):
    edit(copy / "unet" / "config.json", in_channels=channels)
    tensors = load_file(single_files["sd"])
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = torch.zeros(16, channels, 3, 3)
    save_file(tensors, tmp_path / "single.safetensors")
    for source in (copy, tmp_path / "single.safetensors"):
        problem = base_problem(FAMILIES["sd"], str(source))
        assert kind in problem and f"takes {channels} channels" in problem


def test_an_index_without_a_part_and_a_part_without_weights(copy):
    edit(copy / "model_index.json", vae=[None, None])
    assert "has no vae" in base_problem(FAMILIES["sd"], str(copy))
    edit(copy / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    shutil.rmtree(copy / "vae")
    assert "vae is missing" in base_problem(FAMILIES["sd"], str(copy))
    (copy / "model_index.json").unlink()
    assert "has no model_index.json" in base_problem(FAMILIES["sd"], str(copy))


PLAIN = "diffusion_pytorch_model.safetensors"
HALF = PLAIN.replace(".safe", ".fp16.safe")
SHARDS = [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
FOLDERS = {
    "plain": ([PLAIN], None, None), "both": ([PLAIN, HALF], "fp16", None), "fp16 asked": ([HALF], "fp16", None),
    "sharded": ([name.replace(".fp16", "") for name in SHARDS], None, None),
    "fp16 alone": ([HALF], None, "set model.variant=fp16"), "fp16 in shards": (SHARDS, None, "set model.variant=fp16"),
    "another variant": (["model.non_ema.safetensors"], "fp16", "set model.variant=non_ema"),
    "no such variant": ([PLAIN], "fp16", "set model.variant=null"),
    "pickles": (["diffusion_pytorch_model.bin"], None, "only diffusion_pytorch_model.bin, and only .safetensors"),
    "pickled variant": (["model.fp16.bin", "model.bin"], "fp16", "only .safetensors are read"),
    "nothing": ([], None, "has no weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_weights_of_another_variant_or_format(case, tmp_path):
    names, variant, message = FOLDERS[case]
    for name in names:
        (tmp_path / name).touch()
    problem = weights_problem(tmp_path, variant)
    assert problem is None if message is None else message in problem


PATHS = {
    "bases/one": "is a folder here, and holds no one; did you mean bases/onne?",
    "./none": "does not exist (a relative path counts from", "/none/here": "does not exist", "a/b/c": "does not exist",
    "some.safetensors": "does not exist", "~/none": "does not exist", "$HOME/base": "variables such as $HOME",
    "%USERPROFILE%/base": "variables such as", "D:\\bases\\one": "a path of Windows", "C:/bases": "a path of Windows",
    "bases/": None, "org/name": None, "gpt2": None, "two words": "is no hub id",
}  # fmt: skip


@pytest.mark.parametrize("text", PATHS)
def test_what_looks_like_a_path_is_told_as_one(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bases" / "onne").mkdir(parents=True)
    problem = path_problem(text)
    assert problem is None if PATHS[text] is None else PATHS[text] in problem, problem
    if problem:
        with pytest.raises(ConfigError, match="^model.path: "):
            refuse_base(FAMILIES["sd"], ModelConfig(path=text))


@pytest.mark.parametrize("marks", [(), ("v_pred",), ("ztsnr",), ("v_pred", "ztsnr")])
def test_marks_of_a_single_file_are_its_schedulers_settings(marks, model_folders, single_files, tmp_path):
    file = tmp_path / "marked.safetensors"
    save_file({**load_file(single_files["sd"]), **{mark: torch.zeros(0) for mark in marks}}, file)
    assert marks_of(file) == set(marks)
    from diffusers import DDIMScheduler

    config = marked(DDIMScheduler(prediction_type="epsilon"), set(marks)).config
    assert config.prediction_type == ("v_prediction" if "v_pred" in marks else "epsilon")
    assert config.rescale_betas_zero_snr == ("ztsnr" in marks)
    if marks != ("ztsnr",):  # epsilon at zero SNR is refused elsewhere
        layout = ModelConfig(path=str(file), single_file_layout=str(model_folders["sd"]))
        schedule = load_models(FAMILIES["sd"], layout).schedule
        assert schedule.parameterization == ("v_prediction" if "v_pred" in marks else "epsilon")
        assert (float(schedule.alpha_S[-1]) == 0) == ("ztsnr" in marks)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]", (20).to_bytes(8, "little") + b"{}",
                                     b"\x08" + b"\0" * 7 + b'{"a": 1}'])  # fmt: skip
def test_a_broken_file_is_one_line(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=re.escape("cannot be read as a .safetensors file")):
        read_header(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="cannot be read as a .safetensors file"):
        load_models(FAMILIES["sd"], ModelConfig(path=str(tmp_path / "a.safetensors")))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_dbtrain_does_not_train_is_refused_by_name_with_the_reason(kind, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "unet": ["diffusers", "X"]}))
    for family in (FAMILIES["sd"], FAMILIES["flux"]):
        problem = base_problem(family, str(tmp_path))
        assert kind in problem and REFUSED[kind] in problem and "set model.family" not in problem
