"""`train.stop`: what is watched, when training ends, and what is published."""

import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from dbtrain.errors import StopRequested
from dbtrain.packing.pack import Pack
from dbtrain.results.publish import LORA_FILE
from dbtrain.settings.config import DataConfig, StopConfig
from dbtrain.train import train_manifest
from dbtrain.training.bank import Bank, Item
from dbtrain.training.held_out import FIXED, Watched, fixed_samples, held_out, turns
from dbtrain.training.stopping import signals_as_before
from dbtrain.values import Role
from tests.kit.main_job import photo, sample, small_config, write_job

LOSS = StopConfig(metric="loss", patience=2)
WORDS = ("engine.kind=packed", "engine.packed.size=2", "sample.images=0", "train.steps=8", "train.stop.samples=9")
STOP = ("train.stop.metric=loss", "train.stop.every=2", "train.stop.patience=1")
ROWS = "subject,class,images,lr\nrex,dog,rex,0.1\ntom,cat,tom,1e-3\n"
SINGLE = 1e-4
"""float32 sums in another order, after four steps at a hundred times the usual rate."""


def test_one_photo_of_four_is_held_out():
    assert [held_out(photos, LOSS) for photos in (1, 3, 4, 9)] == [0, 0, 1, 1]
    assert held_out(9, StopConfig()) == 0


@pytest.mark.parametrize("held, watched", [(1, {3}), (0, {0, 1, 2, 3})])
def test_what_is_watched_is_the_same_each_time_and_no_training_step_has_it(held, watched):
    items = [Item(sample(number), f"photo {number}") for number in range(4)]
    bank = Bank({Role.INSTANCE: items}, DataConfig(resolution=32, crop="random", flip=True), 0, "rex", 2)
    bank.held = held
    first, again = (fixed_samples(bank, range(8)) for _ in range(2))
    assert set(first.caption_B.tolist()) == watched
    assert torch.equal(first.images_BCHW, again.images_BCHW) and first.slot_B.tolist() == list(range(8))
    trained = {pick for step in range(20) for pick in bank.draw(step, range(2)).caption_B.tolist()}
    assert trained == {0, 1, 2} | ({3} - watched if held else {3})
    assert FIXED > 10**9 and turns(5, 2) == [range(2), range(2, 4), range(4, 5)]


def test_training_ends_when_it_has_not_become_better_for_a_while_and_a_checkpoint_keeps_count():
    watched, kept = Watched(LOSS), {}
    losses = [0.5, 0.4, math.nan, 0.3, 0.3, 0.31]
    for step, loss in enumerate(losses, 1):
        if step == 5:
            before, watched = watched, Watched(LOSS)
            watched.restore(json.loads(json.dumps(before.numbers())), before.best["best"])
        kept[step] = {"a": torch.tensor([float(step)])}
        assert watched.observe(step, loss, lambda step=step: kept[step]) == (step == 6)
    assert watched.best == {"best": kept[4]} and watched.values == {"loss_fixed": 0.31}
    assert watched.told(1)["stop"] == {"metric": "loss", "held_out": 1, "early": True, "best_step": 4,
                                       "best_loss": 0.3, "observations": 6}  # fmt: skip
    assert Watched().numbers() == Watched().values == Watched().best == Watched().told(0) == {}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two subjects: one whose rate is far too high, so that it soon gets worse, and one that gets better."""
    folder = tmp_path_factory.mktemp("job")
    write_job(folder)
    (folder / "photos.csv").write_text(ROWS)
    for number in (2, 3):  # of four photos one is held out
        photo(10 + number).save(folder / "tom" / f"{number}.jpg", quality=90)
    return folder


def train(job, out, *words, names=None):
    """({name: record}, {name: adapter}, {name: lines of the log})."""
    config = small_config(f"prior.store={job / 'priors'}", *WORDS, *words)
    records, failed = train_manifest(job / "photos.csv", config, job / out, names, quiet=True)
    assert not failed
    folders = {record["subject"]: job / out / "subjects" / record["subject"] for record in records}
    logs = {name: list(map(json.loads, (at / "log.jsonl").read_text().splitlines())) for name, at in folders.items()}
    return ({record["subject"]: record for record in records},
            {name: load_file(at / LORA_FILE) for name, at in folders.items()}, logs)  # fmt: skip


@pytest.fixture(scope="module")
def stopped(job):
    return train(job, "stopped", *STOP)


def same(ours, theirs):
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_subject_ends_early_with_its_best_weights_and_its_neighbour_goes_on(job, stopped):
    records, adapters, logs = stopped
    losses = {row["step"]: row["loss_fixed"] for row in logs["rex"] if row["step"] % 2 == 0}
    end, best = records["rex"]["steps"], min(losses, key=losses.get)
    assert end == best + 2 < 8 and list(losses) == list(range(2, end + 1, 2))
    assert records["rex"]["stop"] == {"metric": "loss", "held_out": 0, "early": True, "best_step": best,
                                      "best_loss": losses[best], "observations": end // 2}  # fmt: skip
    assert records["rex"]["stages_s"]["stop"] > 0
    assert same(train(job, "plain", f"train.steps={best}", names=["rex"])[1]["rex"], adapters["rex"])
    assert records["tom"]["steps"] == 8 and not records["tom"]["stop"]["early"]
    assert records["tom"]["stop"]["held_out"] == 1
    assert same(train(job, "alone", *STOP, names=["tom"])[1]["tom"], adapters["tom"])


def test_deepspeeds_engine_ends_at_the_same_step_with_the_same_weights(job, stopped):
    records, adapters, _ = train(job, "zero", *STOP, "engine.kind=zero", "engine.packed.size=auto", names=["rex"])
    ours, theirs = records["rex"]["stop"], stopped[0]["rex"]["stop"]
    assert ours.pop("best_loss") == pytest.approx(theirs["best_loss"], rel=1e-4)
    assert ours == {key: theirs[key] for key in ours} and records["rex"]["steps"] == stopped[0]["rex"]["steps"]
    for key, value in stopped[1]["rex"].items():
        assert (adapters["rex"][key] - value).norm() < SINGLE * value.norm()


def test_what_was_interrupted_ends_as_if_it_had_not_been(job, stopped, monkeypatch):
    batch = Pack.batch

    def stopping(self, banks):
        if any(step == 2 for _, _, step in banks):
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, banks)

    monkeypatch.setattr(Pack, "batch", stopping)
    with signals_as_before(), pytest.raises(StopRequested, match="2 subjects under way"):
        train(job, "resumed", *STOP)
    monkeypatch.undo()
    records, adapters, _ = train(job, "resumed", *STOP)
    for name in ("rex", "tom"):
        assert records[name]["stop"] == stopped[0][name]["stop"] and same(adapters[name], stopped[1][name])
