"""Results that rot after they were finished are found, whatever rotted, and their subjects wait again."""

import json

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.errors import DataError
from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.run_folder import NAME, mark
from dbtrain.fleet.verifying import verify_run
from dbtrain.results.record import RECORD, finished_record, write_record
from dbtrain.storage.atomic import LOCK, held
from tests.kit.fleet_run import RESULT, run_of_dogs, states

ABOUT = dict.fromkeys(("subject", "class", "identifier", "run", "base", "base_digest"), "x")


@pytest.fixture
def out(tmp_path):
    """A run of three finished dogs and one that waits."""
    with run_of_dogs(tmp_path, 4) as ledger:
        for position in range(3):
            folder = tmp_path / "subjects" / f"s{position}"
            folder.mkdir(parents=True)
            (folder / "weights").write_bytes(b"trained" * 9)
            write_record(folder, ABOUT, [folder / "weights"])
            with ledger.commit():
                ledger.start(position, [position], "w")
                ledger.finish(position, 1, {**RESULT, "files": finished_record(folder)["files"]})
                ledger.note_after(position, "generate", "how", "done")
    mark(tmp_path)
    return tmp_path


ROT = {
    "a bit": lambda folder: (folder / "weights").write_bytes(b"trainee" + b"trained" * 8),
    "cut short": lambda folder: (folder / "weights").write_bytes(b"t"),
    "gone": lambda folder: (folder / "weights").unlink(),
    "record": lambda folder: (folder / RECORD).write_text("{"),
    "no record": lambda folder: (folder / RECORD).unlink(),
    "another result": lambda folder: (
        (folder / "weights").write_bytes(b"other"), write_record(folder, ABOUT, [folder / "weights"])
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ROT)
def test_a_rotten_result_waits_again_and_the_others_stay(out, how):
    ROT[how](out / "subjects" / "s1")
    finished, rotten = verify_run(out)
    assert finished == 3 and list(rotten) == ["s1"]
    assert states(out) == {"s0": "finished", "s1": "waiting", "s2": "finished", "s3": "waiting"}
    assert not (out / "subjects" / "s1" / RECORD).exists()
    ledger = Ledger(out)
    assert list(ledger.afterwards()) == ["s0", "s2"] and ledger.row(1)["reason"].startswith("its result rotted")
    ledger.close()
    assert verify_run(out) == (2, {})


def test_a_folder_that_is_not_the_runs_own_is_no_rot(out):
    (out / "subjects").rename(out / "elsewhere")
    (out / NAME).unlink()
    with pytest.raises(DataError, match="not the run's folder on this machine"):
        verify_run(out)
    assert states(out)["s0"] == "finished"


def test_a_subject_that_a_process_holds_is_left_to_it(out):
    ROT["gone"](out / "subjects" / "s1")
    with held(out / "subjects" / "s1" / LOCK):
        assert verify_run(out) == (3, {}) and states(out)["s1"] == "finished"


def test_the_verb_names_what_rotted_and_ends_with_3(out):
    sound = CliRunner().invoke(cli.app, ["batch", "verify", str(out)])
    assert (sound.exit_code, sound.stdout) == (0, "3 results are what they were when they were finished\n")
    ROT["cut short"](out / "subjects" / "s2")
    told = CliRunner().invoke(cli.app, ["batch", "verify", str(out), "--json"])
    assert told.exit_code == 3 and "1 of 3 results have rotted" in told.stderr
    assert list(json.loads(told.stdout)["rotten"]) == ["s2"]
