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


class ModelFolders(dict):
    """Diffusers folders of random models by family name, each made when it is first asked for; read only."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def __missing__(self, name):
        from tests.kit.random_models import FAMILIES

        self[name] = FAMILIES[name](self.root / name)
        return self[name]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """The random models by family name."""
    return ModelFolders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def sd_folder(model_folders):
    """A random model of the Stable Diffusion 1.x layout (eps), as a diffusers folder; read only."""
    return model_folders["sd"]


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
