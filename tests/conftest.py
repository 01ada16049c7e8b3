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
    from tests.random_models import make_sd

    return make_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A random model of the Stable Diffusion XL layout, as a diffusers folder; read only."""
    from tests.random_models import make_sdxl

    return make_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def model_folders(sd_folder, sdxl_folder):
    """The random models by family name."""
    return {"sd": sd_folder, "sdxl": sdxl_folder}


@pytest.fixture(scope="session")
def world():
    """A DeepSpeed world of one process, left at the end of the session."""
    from dbtrain.engines.zero import start_world, stop_world

    yield start_world()
    stop_world()
