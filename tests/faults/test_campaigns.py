"""A part of the fault campaigns; `python benchmarks/faults.py` runs all of them."""

import pytest

from dbtrain.subjects.manifest import scan_manifest
from dbtrain.subjects.sharding import shard_subjects
from tests.faults import campaigns
from tests.faults.forgetting import forget_under_faults
from tests.kit.main_job import small_config


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    return campaigns.Works(tmp_path_factory.mktemp("works") / "works")


def clean(tally: campaigns.Tally, at_least: int) -> None:
    assert tally.wrong == []
    assert tally.cases >= at_least


PARTS = [
    ("shards", 1, 15),
    ("checkpoints", 5, 10),
    ("import_priors", 3, 8),
    ("import_kohya", 5, 5),
    ("index_tar", 3, 5),
]
"""What is struck, at every how many file operations, and how many cases that are at least."""


@pytest.mark.parametrize("action, forever", [("kill", False), ("cut", False), ("ENOSPC", True)])
@pytest.mark.parametrize("part, stride, cases", PARTS)
def test_struck_work_done_again_is_the_undisturbed_work(works, tmp_path, part, stride, cases, action, forever):
    work = getattr(works, part)(tmp_path / "root")
    clean(campaigns.disturb(part, work, tmp_path / "root", action, stride, forever), cases)


@pytest.mark.parametrize("action, first, forever", [("kill", 2, False), ("cut", 5, False), ("ENOSPC", 8, True)])
def test_a_person_is_forgotten_whatever_strikes_meanwhile(tmp_path, action, first, forever):
    clean(forget_under_faults(tmp_path, action, 23, first, forever), 5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part, stride", [("train", 41), ("packed", 67)])
def test_a_whole_run_struck_here_and_there_ends_in_the_same_files(works, tmp_path, part, stride):
    work = getattr(works, part)(tmp_path / "root")
    tally = campaigns.disturb(part, work, tmp_path / "root", "kill", stride)
    clean(tally, 3)
    assert tally.operations > 100


def test_no_damage_to_checkpoints_is_silent(tmp_path):
    clean(campaigns.damage_checkpoints(tmp_path / "root", 60, 30), 100)


def test_no_damage_to_shards_is_silent(works, tmp_path):
    shard_subjects(*scan_manifest(works.manifest), tmp_path / "shards", small_config(), str)
    clean(campaigns.damage_shards(tmp_path / "shards", 30), 90)


def test_no_damage_to_photos_masks_and_captions_is_silent(tmp_path):
    clean(campaigns.damage_sources(tmp_path, 30), 90)


def test_no_damage_to_a_prior_store_is_silent(works, tmp_path):
    works.import_priors(tmp_path)()
    clean(campaigns.damage_priors(tmp_path / "store", 30), 90)
