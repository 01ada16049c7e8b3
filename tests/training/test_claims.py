"""A subject is trained by one process at a time, and all ranks go on from one checkpoint."""

import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from dbtrain.engines.world import World, from_first
from dbtrain.errors import DataError, StopRequested, SubjectTaken
from dbtrain.results.checkpoint import save_checkpoint
from dbtrain.settings.config import CheckpointConfig
from dbtrain.storage.atomic import LOCK, held
from dbtrain.training.claims import choose_checkpoint, read_chosen, take_subject
from tests.faults.campaigns import RUN, checkpoint
from tests.kit.ranks_at_work import on_ranks

ALONE = World(0, 1, "cpu")


def session(world=ALONE, **values):
    nothing = {"stop": False, "taken_wait_s": 0.3, "say": lambda line: None, "beat": lambda stage: None}
    return SimpleNamespace(world=world, **{**nothing, **values})


def test_a_subject_that_another_process_trains_is_refused_after_a_while(tmp_path):
    beats = []
    (tmp_path / "rex").mkdir()
    remains = tmp_path / "rex" / ".samples.png.01234567.tmp"
    remains.touch()
    with held(tmp_path / "rex" / LOCK), pytest.raises(SubjectTaken, match="rex: another process trains this subject"):
        take_subject(session(beat=beats.append), tmp_path / "rex", ExitStack())
    assert len(beats) > 1
    assert remains.exists(), "it may be the other's"
    with ExitStack() as fence:
        take_subject(session(), tmp_path / "rex", fence)
        assert not remains.exists()
        with held(tmp_path / "rex" / LOCK) as ours:
            assert not ours
    with held(tmp_path / "rex" / LOCK) as ours:
        assert ours


def test_a_lock_that_falls_in_time_is_waited_for(tmp_path):
    other = ExitStack()
    assert other.enter_context(held(tmp_path / "rex" / LOCK))
    threading.Timer(0.5, other.close).start()
    with ExitStack() as fence:
        take_subject(session(taken_wait_s=60), tmp_path / "rex", fence)


def test_a_request_to_stop_ends_the_wait(tmp_path):
    begun = time.monotonic()
    with held(tmp_path / "rex" / LOCK), pytest.raises(StopRequested):
        take_subject(session(stop=True, taken_wait_s=60), tmp_path / "rex", ExitStack())
    assert time.monotonic() - begun < 30


def resume(world: World, roots: list[Path], settings: CheckpointConfig):
    """The step that a rank goes on from, each rank having its own view of the storage."""
    mine, root = session(world), roots[world.rank]
    found = from_first(world, lambda: choose_checkpoint(mine, root, settings, RUN))
    return read_chosen(mine, root / "checkpoints" / found.name).step


@pytest.fixture
def roots(tmp_path):
    """A subject's folder with two checkpoints, as seen by each of two ranks."""
    for step in (1, 2):
        save_checkpoint(tmp_path / "0" / "rex" / "checkpoints", checkpoint(step), keep=5)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    return [tmp_path / "0" / "rex", tmp_path / "1" / "rex"]


def test_ranks_go_on_from_the_first_ones_choice(roots):
    newer = roots[1] / "checkpoints"
    save_checkpoint(newer, checkpoint(3), keep=5)
    assert on_ranks(2, resume, roots, CheckpointConfig()) == [2, 2]
    assert on_ranks(2, resume, roots, CheckpointConfig(resume="step-00000001")) == [1, 1]
    missing = on_ranks(2, resume, roots, CheckpointConfig(resume="step-00000003"))
    assert [type(one) for one in missing] == [DataError] * 2
    assert all("step-00000003 does not exist" in str(one) for one in missing)


def test_a_rank_that_does_not_see_it_ends_the_subject_on_all(roots):
    shutil.rmtree(roots[1] / "checkpoints" / "step-00000002")
    ended = on_ranks(2, resume, roots, CheckpointConfig())
    assert [type(one) for one in ended] == [DataError] * 2
    assert all("is damaged or missing to rank 1" in str(one) for one in ended)
