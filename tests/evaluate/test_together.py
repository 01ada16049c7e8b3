"""Pictures of several finished subjects drawn together: the same as one by one, in fewer passes."""

import hashlib
import json
import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbtrain.evaluate.protocol import Protocol, draw, planned, sound
from dbtrain.evaluate.together import draw_together
from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.results.finished import finished_pipeline
from dbtrain.results.publish import LORA_FILE
from tests.kit.main_job import small_config

FAMILY = FAMILIES["sd"]
HOW = Protocol(class_images=1)


@pytest.fixture(scope="module")
def models():
    return load_models(FAMILY, small_config().model)


@pytest.fixture
def folders(trained, tmp_path):
    """Three finished subjects in a copy of their run."""
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("evaluation*"))
    folders = sorted((tmp_path / "out" / "subjects").iterdir())
    for folder in folders:
        strengthen(folder)
    return folders


def strengthen(folder):
    """Make a subject's adapter so strong that its pictures are nobody else's: two steps of training are not enough."""
    state = load_file(folder / LORA_FILE)
    strong = {name: value * (3000 if "lora_B" in name else 1) for name, value in state.items()}
    with safe_open(folder / LORA_FILE, "pt") as file:
        save_file(strong, folder / LORA_FILE, file.metadata())
    record = json.loads((folder / "record.json").read_text())
    digest = hashlib.sha256((folder / LORA_FILE).read_bytes()).hexdigest()
    record["files"] |= {LORA_FILE: digest}
    (folder / "record.json").write_text(json.dumps(record))


def passes(models, call) -> int:
    """Forward passes of the denoiser while something is called."""
    counted = []
    hook = models.denoiser.register_forward_pre_hook(lambda *_: counted.append(1))
    call()
    hook.remove()
    return len(counted)


def test_subjects_drawn_together_have_the_pictures_drawn_alone_in_fewer_passes(folders, models):
    plans = [planned(folder, models, HOW) for folder in folders]
    missing = [[shot for shot in plan.own if not sound(shot.file)] for plan in plans]
    assert [[shot.row for shot in row] for row in missing] == [["class"]] * 3  # training drew the others
    together = passes(models, lambda: draw_together(folders, models, FAMILY, HOW))
    drawn = [np.asarray(Image.open(row[0].file)).astype(int) for row in missing]
    alone = 0
    for folder, plan, (shot,) in zip(folders, plans, missing):
        shot.file.unlink()
        opened = partial(finished_pipeline, folder, FAMILY, models, plan.config)
        alone += passes(models, partial(draw, [shot], opened, plan.config, 8))
    again = [np.asarray(Image.open(row[0].file)).astype(int) for row in missing]
    assert np.abs(drawn[0] - drawn[1]).max() > 20
    # Another batch rounds otherwise: one level of 255.
    assert max(np.abs(a - b).max() for a, b in zip(drawn, again)) <= 1
    assert together == plans[0].config.sample.steps == alone / 3


def test_nothing_is_drawn_for_one_subject_or_for_pictures_that_are_there(folders, models):
    assert passes(models, lambda: draw_together(folders[:1], models, FAMILY, HOW)) == 0
    (folders[1] / "record.json").write_text("{")
    draw_together(folders, models, FAMILY, HOW)
    assert [any((folder / "evaluation").glob("class-*")) for folder in folders] == [True, False, True]
    assert passes(models, lambda: draw_together(folders, models, FAMILY, HOW)) == 0
