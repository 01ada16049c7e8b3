"""A subject's seat: what was asked of the device, what was made, and what is logged of it."""

import json
from types import SimpleNamespace

import pytest

from dbtrain.packing.pack import Observed
from dbtrain.packing.seating import Seating
from dbtrain.training.held_out import Watched
from dbtrain.training.session import Watch
from tests.kit.main_job import small_config


class Pack:
    """Rows that remember what is asked of them."""

    device = "cpu"

    def __init__(self):
        self.seated, self.batches, self.forgotten, self.released = [], [], [], []
        self.engine = SimpleNamespace(release=self.released.append)

    def seat(self, row, start):
        self.seated.append(row)

    def batch(self, banks):
        self.batches.append(banks)

    def step(self, batch):
        pass

    def draw_ahead(self, banks):
        self.ahead = list(banks)

    def forget(self, rows):
        self.forgotten += rows


def job(tmp_path, name, *words):
    config = small_config("track.every_steps=2", *words)
    closed = []
    (tmp_path / name).mkdir()
    return SimpleNamespace(
        config=config,
        folder=tmp_path / name,
        subject=SimpleNamespace(id=name),
        bank=name,
        watch=Watch(quiet=True),
        images_a_step=8,
        watched=Watched(),
        closed=closed,
        close=lambda: closed.append(name),
    )


def start(step=0):
    return SimpleNamespace(checkpoint=SimpleNamespace(step=step))


@pytest.fixture
def seating(tmp_path):
    made = Seating(Pack())
    made.seat(0, job(tmp_path, "rex"), start(), {})
    made.seat(2, job(tmp_path, "tom", "train.steps=9", "checkpoint.every_steps=5"), start(3), {})
    return made


def test_each_subject_makes_its_own_steps_and_has_its_own_cadence(seating):
    seating.step(), seating.step()
    assert seating.pack.batches == [[(0, "rex", 0), (2, "tom", 3)], [(0, "rex", 1), (2, "tom", 4)]]
    rex, tom = seating
    assert (rex.due.log, rex.due.checkpoint, tom.due.log, tom.due.checkpoint) == (True, False, False, True)
    assert len(seating) == 2


def test_a_log_line_counts_the_steps_that_were_made(seating):
    """A row that stopped early makes fewer steps than are asked of it."""
    for _ in range(4):
        seating.step()
    rex = next(iter(seating))
    rex.meter.start -= 10  # seconds ago
    rex.job.watched.observe(2, 0.25, dict)
    values = seating.log(rex, Observed({"loss": 0.5}, 3, False, False, 0.1))
    assert values["steps_per_s"] == pytest.approx(0.3, rel=0.05)
    assert values["images_per_s"] == pytest.approx(8 * values["steps_per_s"])
    assert (rex.logged, rex.wait_s, seating.pack.forgotten) == (3, 0.0, [0])
    line = json.loads((rex.job.folder / "log.jsonl").read_text())
    assert line == {"step": 3, **values} and (line["loss"], line["loss_fixed"]) == (0.5, 0.25)


def test_who_leaves_makes_room_and_who_is_given_up_does_not_touch_the_device(seating):
    rex, tom = seating
    seating.leave(rex)
    assert list(seating.seats) == [2] and seating.pack.released == [0] and rex.sinks[0].file.closed
    seating.close()
    assert tom.job.closed == ["tom"] and seating.pack.released == [0] and not rex.job.closed


def test_the_next_batch_is_drawn_while_the_device_is_busy_but_not_past_the_end(seating):
    ends = seating.seats[0].job.config.train.steps
    for _ in range(ends):
        seating.step()
    assert seating.pack.ahead == ([(2, "tom", 3 + ends)] if 3 + ends < 9 else [])
