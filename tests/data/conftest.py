from pathlib import Path

import pytest

from dbtrain.data.shards import write_shards
from tests.kit.made_photos import make_samples


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory) -> Path:
    """A sound folder of several shards; copy it before doing harm."""
    out = tmp_path_factory.mktemp("sound") / "shards"
    index = write_shards(make_samples(), out, max_bytes=10_000)
    assert len(index.shards) >= 3
    return out
