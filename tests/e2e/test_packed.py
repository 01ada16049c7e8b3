"""A packed run killed in the middle, and the same command again: the bytes of the undisturbed packed run."""

import os
import signal
import time
from pathlib import Path

import pytest

from dbtrain.results.checkpoint import file_digest
from dbtrain.results.publish import LORA_FILE
from tests.kit.forked import dbtrain, start
from tests.kit.main_job import write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SUBJECTS = "rex:dog tom:cat ben:dog ada:cat"
SETTINGS = (
    *("engine.kind=packed", "engine.packed.size=3", "checkpoint.every_steps=2", "sample.images=0"),
    *("train.steps=12", "train.schedule=cosine", "train.ema=0.9", "train.clip_norm=0.03", "data.flip=true"),
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return ["train", *write_job(folder, *SETTINGS, subjects=SUBJECTS), "--subjects", "all"]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    done = dbtrain([*words, "--out", out])
    assert done.returncode == 0, done.stderr
    assert "pack: 4 subjects in" in done.stderr
    return digests(out)


def digests(out: Path) -> dict[str, str]:
    return {path.parent.name: file_digest(path) for path in out.glob(f"subjects/*/{LORA_FILE}")}


def interrupt(words: list, out: Path, name: str, step: int, signum: int) -> tuple[int, str]:
    """Start, and send a signal as soon as a subject has logged a step; (exit code, standard error)."""
    process = start([*words, "--out", out])
    log, deadline = out / "subjects" / name / "log.jsonl", time.monotonic() + 400
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signum)
    return process.wait(timeout=400), process.communicate()[1]


def test_kills_in_both_halves_end_in_the_same_bytes(words, undisturbed, tmp_path):
    """First while three train; then, after a restart, while the fourth has the pack to itself."""
    assert interrupt(words, tmp_path, "rex", 5, signal.SIGKILL)[0] == -signal.SIGKILL
    assert digests(tmp_path) == {}
    assert interrupt(words, tmp_path, "ada", 3, signal.SIGKILL)[0] == -signal.SIGKILL
    assert len(digests(tmp_path)) == 3
    again = dbtrain([*words, "--out", tmp_path])
    assert again.returncode == 0, again.stderr
    assert "ada: resuming after step" in again.stderr and "rex: already finished" in again.stderr
    assert digests(tmp_path) == undisturbed


def test_a_request_to_stop_loses_no_step_of_any_row(words, undisturbed, tmp_path):
    code, stderr = interrupt(words, tmp_path, "tom", 3, signal.SIGTERM)
    assert code == 75 and "3 subjects under way" in stderr and "Traceback" not in stderr
    left = {path.parents[1].name: path.name for path in tmp_path.glob("subjects/*/checkpoints/step-*")}
    assert left.keys() == {"rex", "tom", "ben"} and len(set(left.values())) == 1
    again = dbtrain([*words, "--out", tmp_path])
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path) == undisturbed
