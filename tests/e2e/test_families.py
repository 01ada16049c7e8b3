"""Each flow family from photos to a picture, by the command line: priors, training, samples, artefacts, `generate`."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.kit.main_job import inside, write_job

SMALL = ["data.resolution=64", "train.steps=2", "sample.steps=2", "prior.images=2", "prior.sampler=auto"]
SMALL += ["objective.timesteps=logit_normal", "train.batch=1", "lora.rank=2"]
PACKED = ["engine.kind=packed", "engine.packed.size=2"]
BF16 = ["model.dtype=bf16", "train.precision=bf16", "train.gradient_checkpointing=true"]
ENGINES = {"zero": [], "packed": PACKED, "zero in bf16": BF16, "packed in bf16": [*PACKED, *BF16]}


def run(*words):
    done = inside(words)
    assert done.exit_code == 0, done.output


TARGETS = {name: ["lora.targets=[attention.to_q,attention.to_v]"] for name in ("zimage", "ideogram4")}
"""Of families whose layers have other names than the setting's default."""
CASES = [("sd3", "zero"), ("sd3", "packed in bf16"), ("flux", "zero in bf16"), ("flux", "packed")]
CASES += [("flux2_klein", "packed in bf16"), ("flux2", "packed"), ("zimage", "packed in bf16")]
CASES += [("qwen_image", "zero in bf16"), ("qwen_image", "packed"), ("krea2", "zero"), ("krea2", "packed in bf16")]
CASES += [("chroma", "packed"), ("lumina2", "zero in bf16"), ("sana", "packed in bf16"), ("ideogram4", "packed")]
"""Every family, and every engine with several of them: no code asks for both, so not each with each."""


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_photos_become_an_adapter_and_pictures(name, engine, model_folders, tmp_path):
    words = write_job(tmp_path, f"model.family={name}", *SMALL, *ENGINES[engine], *TARGETS.get(name, []))
    # The tokenizer of a random model has no rare tokens to choose from.
    header, *rows = (tmp_path / "photos.csv").read_text().splitlines()
    named = [f"{header},identifier", *(f"{row},{name}" for row, name in zip(rows, ("zq", "xv")))]
    (tmp_path / "photos.csv").write_text("\n".join(named) + "\n")
    # The last word for a setting counts: this model in place of the job's own.
    run("train", *words, f"model.path={model_folders[name]}", "--subjects", "all", "--out", tmp_path / "out")
    folder = tmp_path / "out" / "subjects" / "rex"
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") and tensor.isfinite().all() for key, tensor in state.items())
    assert any(tensor.any() for key, tensor in state.items() if ".lora_B." in key)
    record = json.loads((folder / "record.json").read_text())
    assert record["family"] == name and 0 < record["loss"] < 100
    run("generate", folder, "--prompt", "{subject} in the snow", "--name", "snow")
    picture = np.asarray(Image.open(folder / "snow.png"))
    assert picture.shape[1] >= 64 and picture.std() > 1
