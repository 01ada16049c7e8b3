"""A small base, the key of its dogs, a store of two blocks and a folder of photos, for all tests of priors."""

import pytest

from dbtrain.models.load import load_models
from dbtrain.priors.draw import make_priors
from dbtrain.priors.store import (
    BLOCK,
    prior_key,
)
from tests.kit.class_images import ALONE, CONFIG, FAMILY
from tests.kit.main_job import photo


@pytest.fixture(scope="module")
def models():
    return load_models(FAMILY, CONFIG.model)


@pytest.fixture(scope="module")
def key(models):
    return prior_key(CONFIG, models, "dog")


@pytest.fixture(scope="module")
def store(tmp_path_factory, models, key):
    """A sound store of two blocks; copy it before doing harm."""
    folder = tmp_path_factory.mktemp("store")
    assert make_priors(folder, key, BLOCK + 2, FAMILY, models, ALONE, 8) == BLOCK + 2
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "dogs"
    folder.mkdir()
    for number in range(5):
        photo(number).save(folder / f"{number}.jpg")
    return folder
