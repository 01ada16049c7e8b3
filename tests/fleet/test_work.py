"""What a trainer does with units: what subjects are charged, packs, finished subjects under kills and mistakes."""

import json
import os
import shutil
import signal
import sqlite3
import time

import pytest
import torch

from dbtrain.fleet.status import read_rows, summarize_run
from dbtrain.fleet.work import Charges, beating
from dbtrain.tiny import IDENTITY
from tests.kit.fleet_run import ask, finish, processes, said, start, states, wait_for, write_small


def test_charges_sum_to_the_time_that_passed():
    for slots in (1, 2, 3):
        before = time.monotonic()
        charges = Charges(["a", "b", "c"], slots)
        begun, costs = time.monotonic(), []
        for name in ("b", "a", "c"):
            time.sleep(0.02)
            ended = time.monotonic()
            costs.append(charges.end(name))
        assert ended - begun <= sum(costs) + 1e-9 and sum(costs) <= time.monotonic() - before + 1e-9
        assert slots > 1 or costs[0] == 0.0


def test_whatever_computes_beats():
    beats = []
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    with beating(beats.append, "evaluate"):
        layer(torch.zeros(1, 2))
    assert beats and set(beats) == {"evaluate"}
    told = len(beats)
    layer(torch.zeros(1, 2))
    assert len(beats) == told


def outcomes(out):
    return {row["subject"]: row["after"] for row in read_rows(out)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_drawing_and_scoring_outlive_a_kill_and_a_subject_that_cannot_be_scored(tmp_path):
    """`--generate`, then `--evaluate`: each is done once for all. A kill costs time only, an error only its subject."""
    words = write_small(tmp_path, "wait-a:dog b:dog index-c:dog d:dog", "sample.images=1", "sample.steps=1")
    words[words.index("--workers") + 1] = "1"
    out, own = tmp_path / "out", tmp_path / "my encoder"
    shutil.copytree(IDENTITY, own)
    finish(start(words, out, "--generate"), out)
    assert outcomes(out) == {name: {"generate": "done"} for name in ("wait-a", "b", "index-c", "d")}
    drawn = (out / "subjects" / "b" / "generated.png").stat().st_mtime_ns

    (out / "hold").touch()
    asked = ["--generate", "--evaluate", "--identity", own]
    driver = start(words, out, *asked, poison=True)
    wait_for((out / "held").exists, driver, out)
    os.kill(processes(driver.pid)["trainer"][0], signal.SIGKILL)
    (out / "hold").unlink()
    finish(driver, out, 3)
    assert "error: --evaluate: failed for 1 subjects" in said(out)
    told = "".join(path.read_text() for path in (out / "logs").iterdir())
    assert told.count("\nIndexError: list index out of range") == 1, "it is told, and ends no trainer"
    found = outcomes(out)
    assert found.pop("index-c")["evaluate"].startswith("IndexError: list index out of range")
    assert found == {name: {"generate": "done", "evaluate": "done"} for name in ("wait-a", "b", "d")}
    table = json.loads((out / "evaluation.json").read_text())
    assert (table["subjects"], list(table["failed"])) == (3, ["index-c"])
    assert table["encoders"]["identity"] == str(own)

    finish(start(words, out, *asked), out)
    assert summarize_run(out)["after"] == {name: {"done": 4, "failed": 0} for name in ("generate", "evaluate")}
    assert json.loads((out / "evaluation.json").read_text())["subjects"] == 4
    assert (out / "subjects" / "b" / "generated.png").stat().st_mtime_ns == drawn, "what was done is not done again"
    assert set(states(out).values()) == {"finished"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_packs_of_auto_have_one_size_for_all_workers_and_drivers(tmp_path):
    """One trainer measures before any subject is given out. A run whose ledger holds the size measures nothing."""
    packed = ("engine.kind=packed", "engine.packed.size=auto", "train.method=lora", "prior.weight=0")
    words = write_small(tmp_path, " ".join(f"s{number}:dog" for number in range(6)), *packed)
    out = tmp_path / "out"
    finish(start(words, out), out)
    assert set(states(out).values()) == {"finished"}
    ((size,),) = ask(out, "SELECT pack FROM run")
    assert size in (1, 2), "three subjects a worker, and sizes are doubled"
    records = [json.loads(path.read_text()) for path in out.glob("subjects/*/record.json")]
    assert [record["pack_size"] for record in records] == [size] * 6
    shutil.rmtree(out / "subjects")
    with sqlite3.connect(out / "ledger.sqlite") as db:
        db.execute("UPDATE subjects SET state='waiting'")
        db.execute("UPDATE run SET pack=3")
    finish(start(words, out), out)
    records = [json.loads(path.read_text()) for path in out.glob("subjects/*/record.json")]
    assert [record["pack_size"] for record in records] == [3] * 6
