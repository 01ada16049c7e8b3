"""The fleet as it runs: real Ray, real processes, real kills. Each test is one story, as every run costs seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest

from dbtrain.errors import FleetError
from dbtrain.fleet.processes import born
from dbtrain.fleet.status import read_rows
from dbtrain.results.record import finished_record
from tests.kit.fleet_run import (
    ask,
    batch,
    command,
    digests,
    finish,
    processes,
    said,
    start,
    states,
    survivors,
    wait_for,
    write_small,
)
from tests.kit.main_job import environment, inside

SUBJECTS = " ".join(f"s{number}:{noun}" for number, noun in enumerate(["dog", "cat"] * 5))
CANARY = "hf_canary0123456789"


def first(out, driver, kind):
    """The first process of a kind, in its first instant."""
    return wait_for(lambda: processes(driver.pid)[kind], driver, out)[0]


def unlike(out, driver, kind, known):
    """A process of a kind that is not `known`."""
    return wait_for(lambda: [pid for pid in processes(driver.pid)[kind] if pid != known], driver, out)[0]


def kill(pid):
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_storm(tmp_path):
    """Kills of a trainer in its first instant and later, of an actor, a warm parent, the driver; and a stopped trainer.

    Nothing is lost, done twice, or different from what an undisturbed run makes; the same command goes on.
    """
    words = write_small(tmp_path, SUBJECTS)
    calm, out = tmp_path / "calm", tmp_path / "out"
    quiet_run = start(words, calm, HF_TOKEN=CANARY)
    wait_for(lambda: "running" in states(calm).values(), quiet_run, calm)
    below = processes(quiet_run.pid)
    assert not [line for pid in below["all"] if b"monitor.py" in (line := command(pid)) or b"dashboard.py" in line]
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in below["trainer"]} == {os.getpriority(os.PRIO_PROCESS, 0)}
    assert len(below["host"]) == 1 and len(below["warm parent"]) == 2
    quiet_run.send_signal(signal.SIGSTOP)  # so that it is still there when the second one looks
    second = batch("run", *words, "--out", calm)
    quiet_run.send_signal(signal.SIGCONT)
    assert second.returncode == 5 and "another driver (pid" in second.stderr
    finish(quiet_run, calm)
    assert set(states(calm).values()) == {"finished"}
    assert set(dict(ask(calm, "SELECT id, attempts FROM subjects")).values()) == {1}

    driver = start(words, out)
    kill(first(out, driver, "trainer"))
    wait_for(lambda: "running" in states(out).values(), driver, out)
    kill(processes(driver.pid)["trainer"][0])
    kill(processes(driver.pid)["actor"][0])
    wait_for(lambda: "finished" in states(out).values(), driver, out)
    below = {pid: born(pid) for pid in processes(driver.pid)["all"]}
    before = digests(out)
    driver.kill()
    driver.wait()
    assert survivors(below) == []
    stamps = {name: (out / "subjects" / name / "record.json").stat().st_mtime_ns for name in before}

    driver = start(words, out, "--hang", "4")
    first(out, driver, "trainer")  # Until then the ledger is as the dead driver left it.
    wait_for(lambda: "running" in states(out).values(), driver, out)
    # All of them, since one could finish the other's subjects before a stopped one is missed.
    stopped = {pid: born(pid) for pid in processes(driver.pid)["trainer"]}
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    since = time.monotonic()
    wait_for(lambda: any(born(pid) != start for pid, start in stopped.items()), driver, out, 60)
    # 4 s without a step, or ten times that if it was stopped while it loaded the base; one poll of grace.
    assert stopped and time.monotonic() - since < 45
    finish(driver, out)
    assert set(states(out).values()) == {"finished"}
    assert digests(out) == digests(calm)
    assert {name: (out / "subjects" / name / "record.json").stat().st_mtime_ns for name in before} == stamps
    twice = ask(out, "SELECT position FROM attempts WHERE outcome='finished' GROUP BY position HAVING count(*) > 1")
    assert twice == []
    look_at(calm, tmp_path)


def look_at(out, tmp_path):
    """What the other verbs say of a finished run, and that no secret is in it."""
    rows = read_rows(out)
    assert [row["subject"] for row in rows] == [f"s{number}" for number in range(10)]
    assert {"subject", "class", "state", "attempts", "reason", "worker", "seconds", "stages_s", "finished"} <= set(
        rows[0]
    )
    assert all(row["stages_s"]["train"] > 0 and row["gpu_seconds"] > 0 for row in rows)
    status = json.loads(batch("status", out, "--json").stdout)
    assert status["subjects"]["finished"] == 10 and not status["driven"] and status["gpu_seconds"]["prior"] > 0
    for name in ("rows.parquet", "rows.csv"):
        assert batch("export", out, "--to", tmp_path / name).stdout.strip().endswith("10 rows")
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["state"] for row in table] == ["finished"] * 10
    assert (tmp_path / "rows.csv").read_text().count("\n") == 11
    hits = [path for path in out.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert hits == [] and CANARY not in said(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_poison(tmp_path):
    """Subjects that crash, hang, run out of memory, hit a bug or have a bad file are quarantined; the others finish."""
    names = "a:dog crash-1:dog b:dog hang-1:dog c:dog oom-1:dog d:dog nan-1:dog e:dog bug-1:dog f:dog file-1:dog g:dog"
    words = write_small(tmp_path, names)
    out = tmp_path / "out"
    driver = start(words, out, "--tries", "2", "--hang", "10", poison=True)
    finish(driver, out, 4)
    found = {row["subject"]: row for row in read_rows(out)}
    assert {name for name, row in found.items() if row["state"] == "finished"} == set("abcdefg")
    causes = {name: (row["state"], row["cause"]) for name, row in found.items() if "-" in name}
    assert causes == {
        "crash-1": ("quarantined", "crash"),
        "hang-1": ("quarantined", "hang"),
        "oom-1": ("quarantined", "oom"),
        "nan-1": ("quarantined", "error"),
        "bug-1": ("quarantined", "error"),
        "file-1": ("quarantined", "file"),
    }
    reasons = {name: found[name]["reason"] for name in causes}
    assert "SIGABRT" in reasons["crash-1"] and "no step for" in reasons["hang-1"]
    assert reasons["nan-1"] == "step 1: the loss is nan" and "ZeroDivisionError" in reasons["bug-1"]
    assert reasons["file-1"].startswith("a.png: Input/output error") and reasons["file-1"].endswith("itself works")
    failures = dict(ask(out, "SELECT id, failures FROM subjects WHERE state='quarantined'"))
    assert set(failures.values()) == {2}
    assert set(dict(ask(out, "SELECT id, failures FROM subjects WHERE state='finished'")).values()) == {0}
    assert "error: crash-1: crash: died of SIGABRT" in said(out)

    assert batch("retry", out, "nan-1", "bug-1").stdout == "2 subjects changed\n"
    assert batch("cancel", out, "bug-1").stdout == "1 subjects changed\n"
    assert "has no subject 'zebra'" in batch("retry", out, "zebra").stderr
    # Without the poison the retried one succeeds, and nobody else is touched.
    finish(start(words, out), out, 4)
    now = states(out)
    assert (now["nan-1"], now["bug-1"], now["crash-1"]) == ("finished", "cancelled", "quarantined")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_between_the_stages_of_a_cascade_costs_neither_stage(tmp_path):
    """The stage that was finished is not trained again, and each stage of each subject is trained once."""
    stage = "tiny_upscaler data.resolution=32 super.low_resolution=16 train.steps=2 train.batch=1 sample.images=0"
    words = write_small(tmp_path, "a:dog between-1:dog", f"stages=['{stage}']")
    words[words.index("--workers") + 1] = "1"
    out = tmp_path / "out"
    finish(start(words, out, poison=True), out)
    killed = (out / "once").stat().st_mtime
    for name, lost in (("a", 0), ("between-1", 1)):
        folder = out / "subjects" / name
        record = finished_record(folder)
        assert record["stages"][0]["run"] == finished_record(folder / "upscaler")["run"]
        for place in (folder, folder / "upscaler"):
            logged = [json.loads(line)["step"] for line in (place / "log.jsonl").read_text().splitlines()]
            assert logged == [1, 2], "each step of each stage once"
        assert ask(out, f"SELECT state, failures, losses FROM subjects WHERE id='{name}'") == [("finished", 0, lost)]
    first, second = ((folder / part / "record.json").stat().st_mtime for part in ("upscaler", "."))
    assert first < killed < second
    ends = "SELECT outcome FROM attempts JOIN subjects USING (position) WHERE id='between-1' ORDER BY attempt"
    assert [end for (end,) in ask(out, ends)] == ["waiting", "finished"]
    (row,) = [row for row in read_rows(out) if row["subject"] == "between-1"]
    assert {"train", "upscaler: train"} < set(row["stages_s"])
    assert row["seconds"] == pytest.approx(sum(row["stages_s"].values()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gang(tmp_path):
    """Two processes train one subject with ZeRO; a killed member takes the gang down and up again, and nobody is blamed
    though the other member sees an error first. Then SIGTERM. Results are those of an undisturbed run."""
    words = [*write_small(tmp_path, "hold-a:dog b:dog", "train.batch=2", "engine.zero.stage=2"), "--gang", "2"]
    words[words.index("--workers") + 1] = "1"
    calm, out = tmp_path / "calm", tmp_path / "out"
    finish(start(words, calm), calm)

    out.mkdir()
    (out / "hold").touch()
    driver = start(words, out, poison=True)
    wait_for((out / "held").exists, driver, out)
    survivor, victim = sorted(processes(driver.pid)["trainer"], key=lambda pid: os.readlink(f"/proc/{pid}/fd/1"))
    ((first_actor,),) = ask(out, "SELECT pid FROM workers")  # of the first member, which survives
    (actor,) = set(processes(driver.pid)["actor"]) - {first_actor}
    birth = born(survivor)
    os.kill(actor, signal.SIGSTOP)  # so that the survivor's error is heard before the word of the kill
    kill(victim)
    (out / "hold").unlink()
    wait_for(lambda: born(survivor) != birth, driver, out)
    time.sleep(0.5)
    (out / "held").unlink()
    (out / "hold").touch()
    os.kill(actor, signal.SIGCONT)
    wait_for((out / "held").exists, driver, out)
    assert ask(out, "SELECT cause, reason FROM attempts WHERE cause!='unbegun'") == [("killed", "died of SIGKILL")]
    assert ask(out, "SELECT failures, losses FROM subjects WHERE id='hold-a'") == [(0, 1)]

    below = {pid: born(pid) for pid in processes(driver.pid)["all"]}
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 75, said(out)
    assert survivors(below) == []
    assert "running" not in states(out).values()
    (out / "hold").unlink()
    finish(start(words, out), out)
    assert set(states(out).values()) == {"finished"}
    records = [json.loads(path.read_text()) for path in out.glob("subjects/*/record.json")]
    assert {(record["world_size"], record["zero_stage"]) for record in records} == {(2, 2)}
    assert digests(out) == digests(calm)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_packs_are_of_one_size_whatever_happens(tmp_path):
    """Two workers, a kill, and a subject tried alone after a crash: every result is that of `dbtrain train`."""
    names = " ".join(["once-a:dog", "hold-b:dog", *(f"s{number}:dog" for number in range(5))])
    packed = ("engine.kind=packed", "engine.packed.size=3", "train.method=lora")
    words = write_small(tmp_path, names, *packed)
    calm, out = tmp_path / "calm", tmp_path / "out"
    trained = inside(["train", *words[: words.index("--workers")], "--subjects", "all", "--out", calm])
    assert trained.exit_code == 0, trained.output

    out.mkdir()
    (out / "hold").touch()
    driver = start(words, out, poison=True)
    wait_for((out / "held").exists, driver, out)
    for trainer in processes(driver.pid)["trainer"]:
        kill(trainer)
    (out / "hold").unlink()
    finish(driver, out)
    assert set(states(out).values()) == {"finished"}
    assert "killed" in dict(ask(out, "SELECT cause, count(*) FROM attempts GROUP BY 1"))
    records = [json.loads(path.read_text()) for path in out.glob("subjects/*/record.json")]
    assert [record["pack_size"] for record in records] == [3] * 7
    assert digests(out) == digests(calm)


@pytest.mark.slow
def test_a_base_that_cannot_be_loaded_ends_the_run_and_shows(tmp_path):
    words, out = write_small(tmp_path, "a:dog"), tmp_path / "out"
    place = next(number for number, word in enumerate(words) if word.startswith("model.path="))
    shutil.copytree(words[place].partition("=")[2], tmp_path / "sd")
    for weights in (tmp_path / "sd" / "unet").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    words[place] = f"model.path={tmp_path / 'sd'}"
    finish(start(words, out), out, 5)
    assert "its trainer cannot start" in said(out)
    status = json.loads(batch("status", out, "--json").stdout)
    assert (status["state"], status["driven"], status["subjects"]["waiting"]) == ("failed", False, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_service_takes_who_comes_forgets_who_asks_and_ends_at_a_second_ctrl_c(tmp_path):
    """Days of `--watch` in small: a newcomer, a person who is forgotten beside the driver, a stop, a start, a hurry."""
    words = write_small(tmp_path, "rex:dog tom:dog eve:dog hang-b:dog")
    out, inbox = tmp_path / "out", tmp_path / "inbox"
    inbox.mkdir()
    words = [str(inbox), *words[1:], "--workers", "1", "--watch"]

    def join(name):
        (inbox / f"{name}.csv").write_text(f"subject,class,images\n{name},dog,../{name}\n")

    def finished(name):
        return lambda: states(out).get(name) == "finished"

    driver = start(words, out)
    wait_for(lambda: "waiting for the first" in said(out), driver, out)
    join("rex")
    wait_for(finished("rex"), driver, out)
    join("tom")
    wait_for(finished("tom"), driver, out)
    assert "will do it" in batch("forget", "tom", "--out", out).stdout
    wait_for(lambda: "forgotten" in states(out).values(), driver, out)
    join("eve")
    wait_for(finished("eve"), driver, out)
    assert not (out / "subjects" / "tom").exists() and (out / "subjects" / "rex" / "record.json").exists()
    driver.send_signal(signal.SIGINT)
    finish(driver, out, 75)

    join("hang-b")
    driver = start(words, out, poison=True)
    wait_for(lambda: states(out).get("hang-b") == "running", driver, out)
    time.sleep(0.5)
    pids = {pid: born(pid) for pid in processes(driver.pid)["all"]}
    driver.send_signal(signal.SIGINT)
    time.sleep(1)
    assert driver.poll() is None, "the first one waits for a checkpoint"
    begun = time.monotonic()
    driver.send_signal(signal.SIGINT)
    finish(driver, out, 130)
    assert time.monotonic() - begun < 20 and survivors(pids, 10) == []
    finish(start([word for word in words if word != "--watch"], out), out)
    assert sorted(states(out).values()) == ["finished", "finished", "finished", "forgotten"]


@pytest.mark.slow
def test_finished_subjects_are_published_though_the_driver_is_killed(tmp_path):
    words, out, far = write_small(tmp_path, "a:dog b:cat c:dog"), tmp_path / "out", tmp_path / "far"
    driver = start(words, out, "--publish-to", far)
    wait_for(lambda: list(far.glob("*/*")), driver, out)
    driver.kill()
    driver.wait()
    finish(start(words, out, "--publish-to", far), out)
    for name in "abc":
        assert finished_record(far / name) == finished_record(out / "subjects" / name)
    assert "uploaded to" in said(out)


def test_a_driver_that_goes_on_loads_no_torch():
    """It takes seconds of each start. `dbtrain.models.load` is for manifests that have changed."""
    parts = "verbs.batch fleet.run fleet.entry fleet.arrivals fleet.forgetting fleet.driver fleet.cluster".split()
    code = f"import sys, {', '.join(f'dbtrain.{part}' for part in parts)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_embedded_ray_that_does_not_come_up_is_one_line(monkeypatch):
    """On a machine with twenty times more work than cores it was a traceback."""

    def late(**_):
        raise Exception("The current node timed out during startup.\nThis could happen")

    cluster = pytest.importorskip("dbtrain.fleet.cluster", exc_type=ImportError)
    monkeypatch.setattr(cluster.ray, "init", late)
    told = "embedded Ray: did not start \\(The current node timed out during startup"
    with pytest.raises(FleetError, match=told), cluster.connected(None, 1):
        raise AssertionError("it is not up")
