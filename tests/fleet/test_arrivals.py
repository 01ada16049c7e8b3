"""Subjects that join while a driver works, with a real ledger and real shards, and without Ray."""

import pytest

from dbtrain.data.stream import verify
from dbtrain.errors import ConfigError
from dbtrain.fleet import arrivals
from dbtrain.fleet.arrivals import Arrivals
from dbtrain.fleet.entry import enter_run
from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.options import Options
from dbtrain.fleet.run import run_batch
from dbtrain.subjects.forgotten import bury
from dbtrain.subjects.manifest import manifest_digest, scan_manifest
from tests.kit.main_job import photo, small_config


class Service:
    """A folder of manifests to which customers come, and a run that watches it."""

    def __init__(self, folder):
        self.folder, self.out, self.said = folder / "inbox", folder / "out", []
        self.folder.mkdir()
        self.out.mkdir()
        self.join("rex")
        self.config = small_config()
        self.ledger = Ledger(self.out, create=True)
        self.begin()

    def begin(self):
        """Start, or start again, as a driver does."""
        self.index = enter_run(self.ledger, self.folder, self.config, self.out, self.said.append, skip_bad=True)
        self.arrivals = Arrivals(self.folder, self.config, self.out, self.said.append)

    def join(self, name, noun="dog", photos=1, text=None):
        (self.folder / name).mkdir(exist_ok=True)
        for number in range(photos):
            photo(hash(name) % 1000 + number).save(self.folder / name / f"{number}.png")
        (self.folder / f"{name}.csv").write_text(text or f"subject,class,images\n{name},{noun},{name}\n")

    def look(self, times=2):
        """Classes of those who joined in so many looks."""
        joined = []
        for _ in range(times):
            self.index, more = self.arrivals.take(self.ledger, self.index)
            joined += more
        return [noun for noun, _ in joined]

    def states(self):
        return dict(self.ledger.db.execute("SELECT id, state FROM subjects"))


@pytest.fixture
def service(tmp_path):
    made = Service(tmp_path)
    yield made
    made.ledger.close()


def test_who_comes_joins_at_the_second_look_and_nothing_that_is_there_is_touched(service, monkeypatch):
    shards = {path: path.stat().st_mtime_ns for path in (service.out / "shards").glob("*.tar")}
    assert service.look() == []
    service.join("tom", "cat", photos=2)
    monkeypatch.setattr(arrivals, "scan_file", reading := Counting(arrivals.scan_file))
    assert service.look(1) == [], "the file may still be being written"
    assert service.look(1) == ["cat"] and reading.names == ["tom.csv"]
    assert service.look(3) == [] and len(reading.names) == 1
    assert service.states() == {"rex": "waiting", "tom": "waiting"} and verify(service.out / "shards") == []
    assert len(service.index.entries_of("tom")) == 2
    assert shards == {path: path.stat().st_mtime_ns for path in shards}
    row = service.ledger.db.execute("SELECT * FROM subjects WHERE id='tom'").fetchone()
    assert row["photos"] and service.ledger.subjects([row["position"]])[0].identifier


class Counting:
    def __init__(self, real):
        self.real, self.names = real, []

    def __call__(self, file, *rest):
        self.names.append(file.name)
        return self.real(file, *rest)


def test_a_restart_finds_what_the_watch_entered_and_what_came_meanwhile(service):
    service.look()
    service.join("tom")
    service.look()
    before = service.ledger.db.execute("SELECT id, spec, photos FROM subjects").fetchall()
    service.join("eve")
    service.begin()
    assert service.states() == dict.fromkeys(("rex", "tom", "eve"), "waiting")
    after = service.ledger.db.execute("SELECT id, spec, photos FROM subjects WHERE id != 'eve'").fetchall()
    assert [tuple(row) for row in before] == [tuple(row) for row in after]
    assert service.look() == [] and not any("another" in line for line in service.said)


def test_a_kill_between_shards_and_ledger_leaves_the_subject_to_the_next_start(service, monkeypatch):
    service.look()
    service.join("tom")
    monkeypatch.setattr(Arrivals, "_enter", lambda *words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        service.look()
    service.begin()
    assert service.states() == dict.fromkeys(("rex", "tom"), "waiting") and verify(service.out / "shards") == []


def test_a_bad_row_is_told_once_keeps_nobody_waiting_and_joins_when_it_is_mended(service, monkeypatch):
    service.look()
    service.join("bad", text="subject,class,images\nbad,dog,nowhere\n")
    service.join("torn", text='subject,class,images\n"torn')
    service.join("twin", text="subject,class,images\nREX,dog,twin\n")
    service.join("tom")
    assert service.look(4) == ["dog"] and service.states() == dict.fromkeys(("rex", "tom"), "waiting")
    told = [line for line in service.said if line.startswith("left out")]
    assert len(told) == len(set(told)) and any("nowhere" in line for line in told)
    assert any("REX" in line and "rex.csv too" in line for line in told), told
    monkeypatch.setattr(arrivals, "AGAIN_S", -1.0)
    (service.folder / "bad.csv").write_text("subject,class,images\nbad,dog,bad\n")
    assert service.look() == ["dog"] and "bad" in service.states()


def test_a_row_left_out_at_the_start_joins_when_its_photos_are_there(service):
    service.join("late", photos=0)
    service.begin()
    assert service.states()["late"] == "skipped"
    photo(5).save(service.folder / "late" / "0.png")
    assert service.look() == ["dog"] and service.states()["late"] == "waiting"


def test_photos_that_come_after_their_row_are_seen_though_the_manifest_stays(service, monkeypatch):
    service.look()
    monkeypatch.setattr(arrivals, "AGAIN_S", 0.0)
    service.join("late", photos=0)
    assert service.look(4) == []
    photo(5).save(service.folder / "late" / "0.png")
    assert service.look() == ["dog"] and sum("left out" in line for line in service.said) == 1


def test_the_forgotten_do_not_join(service):
    bury(service.out, ["tom"])
    service.join("tom")
    assert service.look(3) == [] and sum("was forgotten here" in line for line in service.said) == 1


def test_a_folder_is_one_manifest_in_the_order_of_names_and_its_digest_knows_its_files(service):
    service.join("abe")
    (service.folder / ".hidden.csv").write_text("nothing")
    (service.folder / "notes.txt").write_text("nothing")
    subjects, findings = scan_manifest(service.folder)
    assert [each.id for each in subjects] == ["abe", "rex"] and findings == []
    before = manifest_digest(service.folder)
    (service.folder / "rex.csv").rename(service.folder / "zoe.csv")
    assert manifest_digest(service.folder) != before


def test_shards_that_are_ready_cannot_be_watched(tmp_path):
    config = small_config(f"data.shards={tmp_path}")
    with pytest.raises(ConfigError, match="--watch: data.shards names shards that are ready"):
        run_batch(tmp_path, config, tmp_path / "out", Options(watch=True, quiet=True))
