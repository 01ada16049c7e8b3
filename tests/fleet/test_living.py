"""A ledger takes what joins its run; what is finished stays so, and other changes are refused by name."""

import shutil

import pytest

from dbtrain.errors import ConfigError, DataError
from dbtrain.fleet.entry import enter_run
from dbtrain.fleet.ledger import ADDED, Ledger
from tests.kit.fleet_run import RESULT
from tests.kit.main_job import photo, small_config, write_job


class Run:
    """A run without workers: its manifest, and what its ledger says."""

    def __init__(self, folder):
        write_job(folder, subjects="rex:dog tom:cat")
        self.folder, self.said = folder, []
        self.rows = (folder / "photos.csv").read_text().splitlines()
        (folder / "out").mkdir()

    def enter(self, *overrides, finish=()):
        """States by id, once the manifest has entered and these subjects were finished."""
        (self.folder / "photos.csv").write_text("\n".join(self.rows) + "\n")
        ledger = Ledger(self.folder / "out", create=True)
        try:
            enter_run(ledger, self.folder / "photos.csv", small_config(*overrides), self.folder / "out",
                      self.said.append, skip_bad=True)  # fmt: skip
            with ledger.commit():
                for row in ledger.waiting():
                    if row["id"] in finish:
                        (attempt,) = ledger.start(1, [row["position"]], "w").values()
                        assert ledger.finish(row["position"], attempt, RESULT)
                        ledger.note_after(row["position"], "generate", "how", "done")
            self.after = ledger.afterwards()
            return {row["id"]: row["state"] for row in ledger.rows()}
        finally:
            ledger.close()

    def join(self, name, *row):
        (self.folder / name).mkdir(exist_ok=True)
        photo(len(self.rows) + 50).save(self.folder / name / "z.jpg")
        self.rows += row


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path)
    made.enter(finish=["rex", "tom"])
    return made


def test_rows_that_join_wait_and_finished_ones_stay(run):
    run.join("eve", "eve,dog,eve")
    assert run.enter() == {"rex": "finished", "tom": "finished", "eve": "waiting"}
    assert any("1 subjects join the run" in line for line in run.said)
    run.said.clear()
    assert run.enter()["eve"] == "waiting" and not run.said, "the same again reads no photo"


def test_photos_that_join_a_folder_are_seen_though_the_manifest_is_the_same(run):
    run.join("rex")
    assert run.enter() == {"rex": "waiting", "tom": "finished"}
    assert list(run.after) == ["tom"], "what was drawn of the old result is to be drawn again"
    assert run.enter(finish=["rex"]) == {"rex": "finished", "tom": "finished"}


def test_a_kill_between_shards_and_ledger_loses_no_photo(run, monkeypatch):
    from dbtrain.fleet import entry

    run.join("rex")

    def killed(*_):
        raise SystemExit

    monkeypatch.setattr(entry, "take_in", killed)
    with pytest.raises(SystemExit):
        run.enter()
    monkeypatch.undo()
    assert run.enter() == {"rex": "waiting", "tom": "finished"}


def test_photos_that_are_gone_after_sharding_are_not_missed(run):
    shutil.rmtree(run.folder / "rex")
    assert run.enter() == {"rex": "finished", "tom": "finished"}


def test_a_row_that_is_gone_is_left_alone_and_waits_no_more(run):
    run.join("eve", "eve,dog,eve")
    run.enter()
    eve, tom = run.rows.pop(), run.rows.pop()
    assert run.enter() == {"rex": "finished", "tom": "finished", "eve": "cancelled"}
    assert any("2 subjects have no row any more, as eve" in line for line in run.said)
    run.rows += [tom, eve]
    assert run.enter() == {"rex": "finished", "tom": "finished", "eve": "waiting"}


def test_more_steps_are_for_all_without_steps_of_their_own(run):
    run.rows = ["subject,class,images,steps", "rex,dog,rex,", "tom,cat,tom,"]
    assert run.enter("train.steps=9", "track.every_steps=3") == {"rex": "waiting", "tom": "waiting"}
    with pytest.raises(ConfigError, match="train.steps was 9, is 4"):
        run.enter()
    with pytest.raises(ConfigError, match=r"train.lr was 0.001, is 0.5"):
        run.enter("train.steps=9", "train.lr=0.5")


def test_settings_that_decide_no_result_may_change(run):
    assert run.enter("track.every_steps=3", "checkpoint.every_steps=1") == {"rex": "finished", "tom": "finished"}


@pytest.mark.parametrize(
    "row, match",
    [
        ("rex,dog,rex,x {identifier},", "rex: caption was None, is 'x {identifier}'"),
        ("rex,cat,rex,,", "rex: class_noun was 'dog', is 'cat'"),
        ("rex,dog,rex,,5", "rex: steps was None, is 5"),
    ],
)
def test_a_row_that_says_something_else_is_refused_by_name(run, row, match):
    run.rows = ["subject,class,images,caption,steps", row, "tom,cat,tom,,"]
    with pytest.raises(DataError, match=match):
        run.enter()


def test_a_ledger_of_before_takes_what_joins(run):
    ledger = Ledger(run.folder / "out")
    for table, name, _ in ADDED:
        ledger.db.execute(f"ALTER TABLE {table} DROP COLUMN {name}")
    ledger.close()
    run.join("eve", "eve,dog,eve")
    run.join("rex")
    assert run.enter() == {"rex": "waiting", "tom": "finished", "eve": "waiting"}
