"""What the evaluation's tests share: a finished run, and encoders of the true sizes on disk."""

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from tests.kit.main_job import write_job


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of `dbtrain train` with three small LoRA subjects, two of one class; copy it before writing to it."""
    folder = tmp_path_factory.mktemp("trained")
    words = write_job(folder, "train.steps=2", "sample.images=2", subjects="rex:dog ann:dog mug:vase")
    result = CliRunner().invoke(
        cli.app, ["train", *words, "--subjects", "all", "--out", str(folder / "out"), "--quiet"]
    )
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture(scope="session")
def true_sizes(tmp_path_factory):
    """A folder with a random `vit` (ViT-S/16) and `clip` (CLIP ViT-B/32), laid out as their authors do."""
    from tests.kit.random_models import make_clip_b32, make_vit_s16

    folder = tmp_path_factory.mktemp("encoders")
    make_vit_s16(folder / "vit")
    make_clip_b32(folder / "clip")
    return folder
