"""The paper's second stage on the models that ship with dbtrain: trained, published, loaded back and chained."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dbtrain.tiny import UPSCALER
from dbtrain_embedded import demo
from tests.embedded.conftest import one_thread
from tests.kit.main_job import inside

__all__ = ["one_thread"]
SHORT = "train.steps=2 train.batch=1"
FEW = ["train.steps=2", "train.batch=1", "sample.images=1", "sample.prompts=['a photo of {subject}']"]


def run(*words) -> str:
    done = inside(words)
    assert done.exit_code == 0, done.output
    return done.stdout


def of_side(path, side: int) -> np.ndarray:
    image = Image.open(path)
    assert image.size == (side, side)
    return np.asarray(image, dtype=float)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The manifest of one drawn subject at 128 pixels."""
    return demo.write(tmp_path_factory.mktemp("photos"), ("dog-tan",), 128)


def test_the_embedded_upscaler_is_trained_published_and_enlarges_a_picture(photos, tmp_path):
    run("train", photos, "--subject", "dog-tan", "--config", "tiny_upscaler", "--out", tmp_path, *FEW)
    folder = tmp_path / "subjects" / "dog-tan"
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(UPSCALER / file), load_file(folder / "model" / file)
    assert before.keys() == after.keys() and any((after[key] != before[key]).any() for key in before)
    large = demo.pictures("dog-tan", ("beach",), 128, first=50)[0]
    small = large.resize((64, 64), Image.LANCZOS)
    small.save(tmp_path / "small.png")
    run("generate", folder, "--prompt", "{subject}", "--picture", tmp_path / "small.png", "--name", "large")
    made = of_side(next((folder / "samples" / "large").glob("*.png")), 128)
    assert np.abs(made - large).mean() < np.abs(np.asarray(small.resize((128, 128), 0), dtype=float) - large).mean()


def test_the_embedded_cascade_is_one_job_that_draws_and_is_evaluated(photos, tmp_path):
    stages = f"stages=['tiny_upscaler {SHORT}']"
    few = [*FEW, "prior.images=1", "prior.steps=2", "sample.steps=2", stages]
    run("train", photos, "--subject", "dog-tan", "--config", "tiny", "--out", tmp_path, *few)
    folder = tmp_path / "subjects" / "dog-tan"
    of_side(next((folder / "samples" / "samples").glob("*.png")), 128)
    record = json.loads((folder / "record.json").read_text())
    assert [stage["folder"] for stage in record["stages"]] == ["upscaler"] and record["stages"][0]["level"] == 0
    found = json.loads(run("evaluate", tmp_path, "--images", "1", "--class-images", "1", "--quiet", "--json"))
    assert (found["subjects"], found["failed"], found["counts"]["tuned"]) == (1, {}, 1)
    pictures = list((folder / "evaluation").glob("*.png"))
    assert {path.name.split("-")[0] for path in pictures} == {"base", "class", "tuned"}
    for path in pictures:
        of_side(path, 128)
