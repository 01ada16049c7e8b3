"""Each flow family from photos to a picture, by the command line: priors, training, samples, artefacts, `generate`."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dbtrain import cli
from tests.kit.main_job import write_job

SMALL = ["data.resolution=64", "train.steps=2", "sample.steps=2", "prior.images=2", "prior.sampler=auto"]
SMALL += ["objective.timesteps=logit_normal", "train.batch=1", "lora.rank=2"]
PACKED = ["engine.kind=packed", "engine.packed.size=2"]
BF16 = ["model.dtype=bf16", "train.precision=bf16", "train.gradient_checkpointing=true"]
ENGINES = {"zero": [], "packed": PACKED, "zero in bf16": BF16, "packed in bf16": [*PACKED, *BF16]}


@pytest.fixture(autouse=True)
def signals_as_before():
    import signal

    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def run(*words):
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output


TARGETS = {name: ["lora.targets=[attention.to_q,attention.to_v]"] for name in ("zimage", "ideogram4")}
"""Of families whose layers have other names than the setting's default."""
CASES = [(name, engine) for name in ("sd3", "flux", "flux2_klein") for engine in ENGINES]
CASES += [("flux2", "packed"), ("zimage", "packed in bf16"), ("qwen_image", "zero in bf16"), ("qwen_image", "packed")]
CASES += [("krea2", "zero"), ("krea2", "packed in bf16"), ("chroma", "packed"), ("lumina2", "zero in bf16")]
CASES += [("sana", "packed in bf16"), ("ideogram4", "packed")]


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
