"""A subject is trained by one process at a time, and all ranks go on from one checkpoint."""

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist

from dbtrain.engines.world import World
from dbtrain.errors import DataError, DbtrainError, StopRequested, SubjectTaken
from dbtrain.results.checkpoint import save_checkpoint
from dbtrain.results.identity import Identity
from dbtrain.results.record import read_record, write_record
from dbtrain.settings.config import CheckpointConfig
from dbtrain.storage.atomic import LOCK, held
from dbtrain.training import claims
from dbtrain.training.claims import Claim, claim_subject, read_chosen, take_subject
from dbtrain.training.session import Watch
from tests.faults.campaigns import RUN, checkpoint
from tests.kit.ranks_at_work import on_ranks

RECORD = {**dict.fromkeys(("subject", "class", "identifier", "base", "base_digest"), "rex"), "run": RUN}


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(claims, "WAIT_S", 0.3)


def watch(**values):
    return Watch(quiet=True, **values)


def test_a_subject_that_another_process_trains_is_refused_after_a_while(tmp_path):
    beats = []
    (tmp_path / "rex").mkdir()
    remains = tmp_path / "rex" / ".samples.png.01234567.tmp"
    remains.touch()
    with held(tmp_path / "rex" / LOCK), pytest.raises(SubjectTaken, match="rex: another process trains this subject"):
        take_subject(watch(beat=beats.append), tmp_path / "rex", ExitStack())
    assert len(beats) > 1
    assert remains.exists(), "it may be the other's"
    with ExitStack() as fence:
        take_subject(watch(), tmp_path / "rex", fence)
        assert not remains.exists()
        with held(tmp_path / "rex" / LOCK) as ours:
            assert not ours
    with held(tmp_path / "rex" / LOCK) as ours:
        assert ours


def test_a_lock_that_falls_in_time_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "WAIT_S", 60)
    other = ExitStack()
    assert other.enter_context(held(tmp_path / "rex" / LOCK))
    threading.Timer(0.5, other.close).start()
    with ExitStack() as fence:
        take_subject(watch(), tmp_path / "rex", fence)


def test_a_request_to_stop_ends_the_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "WAIT_S", 60)
    begun, stopped = time.monotonic(), watch()
    stopped.stop.ask()
    with held(tmp_path / "rex" / LOCK), pytest.raises(StopRequested):
        take_subject(stopped, tmp_path / "rex", ExitStack())
    assert time.monotonic() - begun < 30


def claimed(world: World, cases: list[tuple[Path, CheckpointConfig, str]]) -> list[tuple]:
    """A rank's claims or errors, the messages that each took, and how often this rank said that there is work."""
    sent, opened, send, answers = [], [], dist.broadcast_object_list, []
    dist.broadcast_object_list = lambda told: sent.append(1) or send(told)
    claims.WAIT_S = 0.3
    for folder, settings, run in cases:
        sent.clear(), opened.clear()
        try:
            with ExitStack() as fence:
                watching = watch(opened=lambda: opened.append(1))
                said = claim_subject(world, watching, folder, settings, Identity(run), fence)
                with held(folder / LOCK) as ours:
                    assert not ours, "the first rank holds it for all"
                dist.barrier()
        except DbtrainError as error:
            said = error
        answers.append((said, len(sent), len(opened)))
    return answers


@pytest.fixture
def rex(tmp_path):
    """A subject's folder with two checkpoints."""
    for step in (1, 2):
        save_checkpoint(tmp_path / "rex" / "checkpoints", checkpoint(step), keep=5)
    return tmp_path / "rex"


def test_one_message_brings_all_ranks_the_first_ones_answer(rex):
    done, lost, taken = (rex.with_name(name) for name in ("done", "lost", "taken"))
    for folder in (done, lost):
        folder.mkdir()
        (folder / "weights").write_bytes(b"trained")
        write_record(folder, RECORD, [folder / "weights"])
    (lost / "weights").unlink()
    latest, first = CheckpointConfig(), CheckpointConfig(resume="step-00000001")
    cases = [
        (rex, latest, RUN, Claim(None, rex / "checkpoints" / "step-00000002")),
        (rex, first, RUN, Claim(None, rex / "checkpoints" / "step-00000001")),
        (rex.with_name("new"), latest, RUN, Claim()),
        (done, latest, RUN, Claim(read_record(done))),
        (lost, latest, RUN, Claim()),
        (rex, CheckpointConfig(resume="step-00000003"), RUN, (DataError, "step-00000003 does not exist")),
        (rex, latest, "b" * 64, (DataError, "other settings or data")),
        (done, latest, "b" * 64, (DataError, "trained with other settings or data")),
        (taken, latest, RUN, (SubjectTaken, "another process trains this subject")),
    ]
    with held(taken / LOCK):
        ranks = on_ranks(2, claimed, [case[:3] for case in cases])
    for rank, answers in enumerate(ranks):
        for (folder, *_, want), (said, sent, opened) in zip(cases, answers, strict=True):
            assert sent == 1, folder
            if isinstance(want, Claim):
                assert said == want and opened == (rank == 0 and want.record is None), folder
            else:
                assert type(said) is want[0] and want[1] in str(said) and not opened, folder
    assert read_record(lost) is None


def resumed(world: World, folders: list[Path]) -> int:
    """The step that a rank goes on from, each rank having its own view of the storage."""
    return read_chosen(world, watch(), folders[world.rank]).step


def test_a_rank_that_does_not_see_the_chosen_checkpoint_ends_the_subject_on_all(rex):
    folder, other = rex / "checkpoints" / "step-00000002", rex.with_name("other") / "checkpoints" / "step-00000002"
    ended = on_ranks(2, resumed, [folder, other])
    assert [type(error) for error in ended] == [DataError] * 2
    assert all("is damaged or missing to rank 1" in str(error) for error in ended)
