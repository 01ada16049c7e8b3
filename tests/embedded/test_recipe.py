"""The command that runs the stages."""

import pytest

from dbtrain.tiny import BASE
from dbtrain_embedded import recipe


def test_the_shipped_tokenizer_is_not_overwritten(tmp_path):
    before = (BASE / "tokenizer" / "vocab.json").read_bytes()
    with pytest.raises(SystemExit, match="weights belong to it"):
        recipe.main(["tokenizer", "--work", str(tmp_path)])
    assert (BASE / "tokenizer" / "vocab.json").read_bytes() == before
