"""What a fleet does with finished subjects: drawing and scoring, under the same kills and mistakes as training."""

import json
import os
import shutil
import signal

import pytest
import torch

from dbtrain.fleet.status import read_rows, summarize_run
from dbtrain.fleet.trainer import beating
from dbtrain.tiny import IDENTITY
from tests.kit.fleet_run import batch, finish, processes, said, start, states, wait_for, write_small


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


@pytest.mark.parametrize("asked, overrides, told", [
    (["--evaluate", "--protocol", "thorough"], [], "--protocol: got 'thorough', want dreambooth or quick"),
    (["--evaluate", "--identity", "no/where"], [], "no/where"),
    (["--evaluate"], ["sample.prompts=[]"], "the quick protocol has no prompts of its own"),
    (["--generate"], ["sample.images=0"], "--generate: there is nothing to draw"),
    (["--clip", "no/where"], [], "give --evaluate too"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_before_any_work(tmp_path, asked, overrides, told):
    words = write_small(tmp_path, "a:dog", "sample.images=1", *overrides)
    done = batch("run", *words, "--out", tmp_path / "out", *asked)
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_whatever_computes_beats():
    beats = []
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    with beating(beats.append, "evaluate"):
        layer(torch.zeros(1, 2))
    assert beats and set(beats) == {"evaluate"}
    told = len(beats)
    layer(torch.zeros(1, 2))
    assert len(beats) == told
