"""A training that is stopped, killed or damaged, and the same command again: the result of the undisturbed run."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from dbtrain.storage.atomic import file_digest
from tests.kit.forked import dbtrain, start
from tests.kit.main_job import inside, write_job

# Seconds each on an idle machine; a busy one has shown thirty times that.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 16
LORA = Path("subjects", "rex", "pytorch_lora_weights.safetensors")
SETTINGS = (f"train.steps={STEPS}", "train.schedule=cosine", "train.ema=0.9", "data.flip=true", "sample.images=0")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return ["train", *write_job(folder, *SETTINGS, subjects="rex:dog"), "--subject", "rex"]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    done = dbtrain([*words, "--out", out])
    assert done.returncode == 0, done.stderr
    return out


def disturb(words: list, out: Path, step: int, signum: int) -> tuple[int, str]:
    """Start, and send a signal as soon as `step` is logged; (exit code, standard error)."""
    process = start([*words, "--out", out])
    log, deadline = out / "subjects" / "rex" / "log.jsonl", time.monotonic() + 400
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signum)
    return process.wait(timeout=400), process.communicate()[1]


def refused(words: list) -> str:
    """What a command says that is refused before it trains."""
    done = inside(words)
    assert done.exit_code == 3, done.output
    return done.stderr


def losses(out: Path) -> dict[int, float]:
    rows = map(json.loads, (out / "subjects" / "rex" / "log.jsonl").read_text().splitlines())
    found: dict[int, float] = {}
    for row in rows:
        assert found.setdefault(row["step"], row["loss"]) == row["loss"]
    return found


def assert_same_result(out: Path, undisturbed: Path) -> None:
    assert file_digest(out / LORA) == file_digest(undisturbed / LORA)
    assert losses(out) == losses(undisturbed)
    assert sorted(losses(out)) == list(range(1, STEPS + 1))


def test_a_request_to_stop_loses_no_step(words, undisturbed, tmp_path):
    """SIGTERM, then SIGUSR1 to the process that goes on."""
    done = 0
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        code, stderr = disturb(words, tmp_path, done + 2, signum)
        assert code == 75, stderr
        assert "stopped on request after step" in stderr and "Traceback" not in stderr
        assert done == 0 or f"rex: resuming after step {done}" in stderr
        done = max(int(path.name.split("-")[1]) for path in (tmp_path / "subjects/rex/checkpoints").iterdir())
        assert done == max(losses(tmp_path)) < STEPS
    again = dbtrain([*words, "--out", tmp_path])
    assert again.returncode == 0, again.stderr
    assert f"rex: resuming after step {done}" in again.stderr
    assert_same_result(tmp_path, undisturbed)


def test_a_kill_and_damage_and_another_stage_end_in_the_same_adapter(words, undisturbed, tmp_path):
    """SIGKILL twice with a checkpoint a step; the newest then damaged: the one before is taken, with a word."""
    words = [*words, "checkpoint.every_steps=1"]
    assert disturb(words, tmp_path, 3, signal.SIGKILL)[0] == -signal.SIGKILL
    folder = tmp_path / "subjects" / "rex" / "checkpoints"
    newest = max(path for path in folder.iterdir() if path.name.startswith("step-"))
    assert int(newest.name.split("-")[1]) >= 2
    bad = bytearray((newest / "state.safetensors").read_bytes())
    bad[random.Random(0).randrange(len(bad))] ^= 4
    (newest / "state.safetensors").write_bytes(bad)
    changed = refused([*words, "--out", tmp_path, "train.lr=2e-3"])
    assert "belongs to a run with other settings or data" in changed
    again = dbtrain([*words, "--out", tmp_path])
    assert again.returncode == 0, again.stderr
    assert f"{newest}: state.safetensors differs from its digest; falling back" in again.stderr
    assert f"resuming after step {int(newest.name.split('-')[1]) - 1}" in again.stderr
    assert_same_result(tmp_path, undisturbed)


def test_damage_to_every_checkpoint_means_a_fresh_start_with_a_word(words, undisturbed, tmp_path):
    words = [*words, "checkpoint.every_steps=2"]
    assert disturb(words, tmp_path, 5, signal.SIGKILL)[0] == -signal.SIGKILL
    folders = [path for path in (tmp_path / "subjects/rex/checkpoints").iterdir() if path.name.startswith("step-")]
    assert folders
    for folder in folders:
        content = (folder / "state.json").read_bytes()
        (folder / "state.json").write_bytes(content[:-1])
    again = dbtrain([*words, "--out", tmp_path])
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("state.json differs from its digest") == len(folders)
    assert "resuming" not in again.stderr
    assert_same_result(tmp_path, undisturbed)


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, file_digest(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_finished_subject_is_left_alone_and_other_settings_are_refused(words, undisturbed, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    before = tree(out)
    again = dbtrain([*words, "--out", out, "--json"])
    assert again.returncode == 0, again.stderr
    assert "rex: already finished in" in again.stderr
    assert json.loads(again.stdout[again.stdout.index("[\n") :])[0]["subject"] == "rex"
    for change in ("train.lr=2e-3", "data.resolution=48"):
        assert "another --out" in refused([*words, "--out", out, change])
    assert tree(out) == before
