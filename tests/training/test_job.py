"""One subject's training: its step on any rank, and what follows a step."""

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dbtrain.data.index import Index
from dbtrain.engines.capture import Capture, Eager
from dbtrain.engines.engine import BatchPlan
from dbtrain.engines.world import World
from dbtrain.errors import EngineError, StopRequested
from dbtrain.results.checkpoint import read_checkpoint
from dbtrain.results.identity import Identity
from dbtrain.training import job as module
from dbtrain.training.job import Job, train_step
from dbtrain.training.session import Base, PriorCache, Stop, Watch, Work
from dbtrain.values import Subject
from tests.kit.main_job import small_config

ALONE, EAGER = World(0, 1, "cpu"), Eager(Capture("off", ""))


class Engine(SimpleNamespace):
    """An engine whose loss is 1 and whose gradient has a norm that is given."""

    def __call__(self, *_):
        return SimpleNamespace(loss=torch.ones(()), per_sample_B=torch.ones(2))

    def backward(self, loss):
        self.turns += 1

    def step(self, scale):
        return self.norm


def step(monkeypatch, sums, norm=1.0, turns=1):
    """A step of one process that plays the sum over all ranks by adding `sums`; (values, forward passes)."""
    monkeypatch.setattr(module.dist, "all_reduce", lambda totals: totals.add_(torch.tensor(sums)))
    engine = Engine(world=ALONE, groups=[SimpleNamespace(lr=2.0)], norm=norm, turns=0)
    bank = SimpleNamespace(batch=lambda *_: SimpleNamespace(role_B=torch.tensor([0, 1])))
    values, _ = train_step(engine, EAGER, bank, BatchPlan(turns, 1, turns), 6, 0.5, Stop())
    return values, engine.turns


def test_the_stop_flag_of_any_rank_reaches_all(monkeypatch):
    """The flag is summed with the losses, so that no rank stops alone."""
    values, turns = step(monkeypatch, [0.0, 0, 0, 1], turns=3)
    assert values["stop"] == 1 and turns == 3
    assert (values["loss"], values["grad_norm"], values["lr"]) == (3, 1.0, 1.0)
    assert step(monkeypatch, [0.0, 0, 0, 0])[0]["stop"] == 0


def test_numbers_that_are_not_finite_end_the_subject_before_they_become_weights(monkeypatch):
    with pytest.raises(EngineError, match="step 7: the loss is nan; the last checkpoint is kept. Lower train.lr"):
        step(monkeypatch, [torch.nan, 0, 0, 0])
    for norm in (torch.inf, torch.nan, -1.0):
        with pytest.raises(EngineError, match="step 7: the gradient is not finite; .* Lower train.lr"):
            step(monkeypatch, [0.0, 0, 0, 0], norm)


@pytest.fixture
def job(tmp_path):
    config = small_config("train.steps=4", "checkpoint.every_steps=2", "sample.every_steps=3", "sample.images=0")
    base = Base(ALONE, None, None, config, PriorCache(1))
    work = Work.under(tmp_path, config, [Subject("rex", "dog", ())], {"rex": "srx"}, Index((), ()))
    return Job(base, work, Watch(quiet=True), work.subjects[0], config, Identity("a" * 64, {}), None, None, ExitStack())


def test_what_follows_a_step(job):
    """A checkpoint at its interval, and at once when asked to stop; after the last step only where it is asked for."""
    states = []

    def state(row):
        states.append(row)
        return {"master": {"unet.a": torch.ones(1, 2)}}

    engine = SimpleNamespace(state=state)
    for done in (1, 2, 3):
        job.after_step(engine, done, stop=False)
    assert states == [0] and job.watch.clock.seconds.keys() == {"save", "sample"}
    with pytest.raises(StopRequested, match="rex: stopped on request after step 3"):
        job.after_step(engine, 3, stop=True)
    job.after_step(engine, 4, stop=True)
    folders = sorted((job.folder / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000003"]
    assert read_checkpoint(folders[1]).run == job.identity.run
    replace(job, config=job.config.replaced("checkpoint.last", True)).after_step(engine, 4, stop=True)
    assert [folder.name for folder in sorted((job.folder / "checkpoints").iterdir())][-1] == "step-00000004"
