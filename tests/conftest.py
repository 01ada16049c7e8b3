"""What every test may rely on: no hub is asked for anything, and tests for a GPU are skipped where there is none."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """Skips tests marked `gpu` on a machine without CUDA; torch is loaded only if there are such tests."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A random model of the Stable Diffusion 1.x layout (eps), as a diffusers folder; read only."""
    from tests.kit.random_models import make_sd

    return make_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A random model of the Stable Diffusion XL layout, as a diffusers folder; read only."""
    from tests.kit.random_models import make_sdxl

    return make_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, sd_folder, sdxl_folder):
    """The random models by family name: what `make_<family>` in tests/kit/random_models.py makes."""
    from dbtrain.families import FAMILIES
    from tests.kit import random_models

    made = {"sd": sd_folder, "sdxl": sdxl_folder}
    for name in FAMILIES:
        if name not in made:
            made[name] = getattr(random_models, f"make_{name}")(tmp_path_factory.mktemp("models") / name)
    return made


@pytest.fixture(scope="session")
def world():
    """A DeepSpeed world of one process, left at the end of the session."""
    from dbtrain.engines.world import start_world, stop_world

    yield start_world()
    stop_world()


@pytest.fixture
def photo_folder(tmp_path):
    """Two subjects: `tiger` (one JPEG) and `cat` (three photos whose natural and plain orders differ)."""
    from tests.kit.made_photos import jpeg, picture, png

    for name, files in {"cat": ("p1.png", "p2.PNG", "p10.png"), "tiger": ("a.jpg",)}.items():
        (tmp_path / name).mkdir()
        for seed, file in enumerate(files):
            make = jpeg if file.endswith("jpg") else png
            (tmp_path / name / file).write_bytes(make(picture(seed=seed)))
    return tmp_path
