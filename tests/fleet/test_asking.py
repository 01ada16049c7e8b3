"""What one asks of a run from another terminal, and of one that is not there or not right: real commands, real runs."""

import sqlite3

import pytest

from dbtrain.fleet.lease import Lease
from tests.kit.fleet_run import ask, batch, finish, start, states, wait_for, write_small


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_living_driver_obeys_and_the_next_one_does_what_the_last_did_not(tmp_path):
    words = write_small(tmp_path, "bug-a:dog hold-b:dog c:dog d:dog")
    words[words.index("--workers") + 1] = "1"
    out = tmp_path / "out"
    out.mkdir()
    (out / "hold").touch()
    driver = start(words, out, "--tries", "1", "--unit", "1", poison=True)
    wait_for((out / "held").exists, driver, out)
    assert states(out) == {"bug-a": "quarantined", "hold-b": "running", "c": "waiting", "d": "waiting"}
    for words_, after in ((("cancel", out, "c"), ("c", "cancelled")), (("retry", out, "bug-a"), ("bug-a", "waiting"))):
        done = batch(*words_)
        assert done.stdout == "the driver at work, or the next one, will do it\n", done.stderr
        wait_for(lambda after=after: states(out)[after[0]] == after[1], driver, out)
    (out / "hold").unlink()
    finish(driver, out, 4)
    assert states(out) == {"bug-a": "quarantined", "hold-b": "finished", "c": "cancelled", "d": "finished"}
    assert dict(ask(out, "SELECT id, attempts FROM subjects"))["bug-a"] == 2
    assert ask(out, "SELECT state FROM run") == [("done",)]

    # A driver that looks at its inbox no more, but still holds the lease.
    lease = Lease(out)
    assert "the next one" in batch("retry", out).stdout
    lease.release()
    finish(start(words, out), out)
    assert set(states(out).values()) == {"finished"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plan_and_a_run_leave_out_what_is_bad(tmp_path):
    words = write_small(tmp_path, "a:dog b:cat c:dog")
    (tmp_path / "a" / "0.jpg").write_bytes(b"no photo")
    with open(tmp_path / "photos.csv", "a") as file:
        file.write("d,dog,nowhere\n")
    out = tmp_path / "out"
    done = batch("run", *words, "--out", out, "--plan")
    assert (done.returncode, "nowhere" in done.stderr) == (3, True), done.stderr
    done = batch("run", *words, "--out", out, "--plan", "--skip-bad")
    assert done.returncode == 0 and done.stdout.startswith("subjects: 3 waiting, in 2 classes\nshards: 6 photos")
    assert "\nengine: auto here is " in done.stdout
    assert not out.exists()
    refused = batch("run", *words, "--out", out)
    assert (refused.returncode, "Traceback" in refused.stderr) == (3, False)
    assert not (out / "run.json").exists(), "a command that was refused is nothing to go on with"
    told = batch("export", out, "--to", tmp_path / "rows.csv")
    assert (told.returncode, "has no subjects yet" in told.stderr) == (3, True), told.stderr
    finish(start(words, out, "--skip-bad"), out)
    assert states(out) == {"a": "skipped", "b": "finished", "c": "finished", "d": "skipped"}
    done = batch("run", *words, "--out", tmp_path / "next", "--plan", "--skip-bad", "--measured", out)
    assert "by 2 subjects measured in" in done.stdout


def refused(out, *words):
    """The one error line of a command that ends with this code, without a traceback."""
    done = batch(*words)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_mistakes_are_one_line_and_leave_nothing_behind(tmp_path):
    out = tmp_path / "out"
    code, line = refused(out, "run", tmp_path / "none.csv", "--config", "tiny", "--out", out)
    assert code == 3 and "none.csv: there is no such manifest" in line
    assert not out.exists()
    code, line = refused(out, "export", out, "--to", tmp_path / "no" / "x.csv")
    assert code == 2 and "its folder does not exist" in line
    out.mkdir()
    (out / "ledger.sqlite").write_bytes(b"no ledger" * 1000)
    code, line = refused(out, "status", out)
    assert code == 3 and "is no ledger (file is not a database)" in line
    (out / "ledger.sqlite").unlink()
    (out / "ledger.sqlite").mkdir()
    code, line = refused(out, "status", out)
    assert code == 5 and "cannot be opened and written (unable to open database file)" in line


@pytest.mark.parametrize("words", [
    ("--protocol", "dreambooth"), ("--identity", "none"), ("--clip", "none"), ("--distance", "dino"),
])  # fmt: skip
def test_how_to_evaluate_is_refused_where_nothing_is_evaluated(tmp_path, words):
    out = tmp_path / "out"
    code, line = refused(out, "run", tmp_path / "none.csv", "--config", "tiny", "--out", out, *words)
    assert code == 2 and "say how to evaluate; give --evaluate too" in line
    assert not out.exists()


def words_of(tmp_path, out, *more):
    return ["run", *write_small(tmp_path, "a:dog"), "--out", out, *more]


def test_a_run_keeps_its_ledger_where_it_is(tmp_path):
    """A refused command does not redirect a run; a run whose ledger is not there is not begun anew."""
    out, ours, other = tmp_path / "out", tmp_path / "ours", tmp_path / "other"
    words = [*words_of(tmp_path, out, "--ledger"), ours]
    lease = Lease(ours)
    assert "another driver" in refused(out, *words)[1]
    assert not (out / "ledger.where").exists()
    lease.release()

    out.mkdir(exist_ok=True)
    (out / "ledger.where").write_text(str(ours))
    code, line = refused(out, *words)
    assert code == 5 and "is not there" in line and not (ours / "ledger.sqlite").exists()
    sqlite3.connect(ours / "ledger.sqlite").close()
    code, line = refused(out, *words[:-1], other)
    assert code == 2 and f"is in {ours}" in line
    assert (out / "ledger.where").read_text() == str(ours) and not other.exists()


def test_a_ledger_is_of_one_run(tmp_path):
    from dbtrain.fleet.ledger import Ledger

    out, ours = tmp_path / "out", tmp_path / "ours"
    ours.mkdir()
    ledger = Ledger(ours, create=True)
    with ledger.commit():
        ledger.create_run(dict.fromkeys(("config", "config_digest", "manifest", "manifest_digest"), ""), [])
    ledger.close()
    code, line = refused(out, *words_of(tmp_path, out, "--ledger", ours))
    assert code == 2 and "holds another run's ledger" in line
    assert not (out / "ledger.where").exists()
