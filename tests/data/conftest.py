from pathlib import Path

import pytest

from dbtrain.data.shards import write_shards
from tests.data.made import jpeg, make_samples, picture, png


@pytest.fixture
def photo_folder(tmp_path) -> Path:
    """Two subjects: `tiger` (one JPEG) and `cat` (three photos whose natural and plain orders differ)."""
    for name, files in {"cat": ("p1.png", "p2.PNG", "p10.png"), "tiger": ("a.jpg",)}.items():
        (tmp_path / name).mkdir()
        for seed, file in enumerate(files):
            make = jpeg if file.endswith("jpg") else png
            (tmp_path / name / file).write_bytes(make(picture(seed=seed)))
    return tmp_path


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory) -> Path:
    """A sound folder of several shards; copy it before doing harm."""
    out = tmp_path_factory.mktemp("sound") / "shards"
    index = write_shards(make_samples(), out, max_bytes=10_000)
    assert len(index.shards) >= 3
    return out
