"""A fleet on a Ray cluster that is not its own: one that is too small, that grows, that wants another token."""

import os
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.fleet_run import ask, states, write_small
from tests.kit.main_job import ROOT, environment
from tests.kit.two_hosts import missing, two_hosts, write_token

WHY_NOT = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "two hosts"),
]


@pytest.fixture
def short():
    """A folder with a short name: Ray's sockets have at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="dbc-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def ray_start(host, *words):
    """A Ray node of one CPU on a host, without a dashboard."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--disable-usage-stats",
               "--object-store-memory=100000000", f"--node-ip-address={host.address}", *words]  # fmt: skip
    done = host.run(*command)
    assert done.returncode == 0, done.stdout


def wait_for(condition, driver, said, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, said()
        assert time.monotonic() < end, said()
        time.sleep(0.1)


@contextmanager
def cluster(short, **variables):
    """Two hosts with a token, a Ray head on the first, and a way to start `batch run` there: (driver, what it says)."""
    with two_hosts() as (first, second):
        token = write_token(short / "token")
        for host in (first, second):
            host.variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **variables}
        ray_start(first, "--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={short / 'ray'}")

        def start(words):
            command = [sys.executable, "-m", "dbtrain", "batch", "run", *words, "--address", f"{first.address}:6379"]
            with open(short / "err", "wb") as log:
                return first.start(*command, stdout=log, stderr=log), lambda: (short / "err").read_text()

        yield first, second, start


def test_a_cluster_that_is_too_small_is_said_and_one_that_grows_is_used(short):
    """A gang of two waits for a second machine; before, commands with a wrong token and without one are refused."""
    words = [*write_small(short, "a:dog b:dog", "train.batch=2"), "--gang", "2", "--out", short / "out"]
    words[words.index("--workers") + 1] = "1"
    with cluster(short) as (first, second, start):
        right = first.variables["RAY_AUTH_TOKEN_PATH"]
        (short / "wrong").write_text("0" * 48)
        (short / "wrong").chmod(0o600)
        for name, told in (("wrong", "or none that takes this token"), ("none", "Ray's token is missing or wrong")):
            first.variables["RAY_AUTH_TOKEN_PATH"] = str(short / name)
            done = first.dbtrain("batch", "run", *words, "--address", f"{first.address}:6379")
            assert (done.returncode, "Traceback" in done.stdout) == (5, False), done.stdout
            assert told in done.stdout
        first.variables["RAY_AUTH_TOKEN_PATH"] = right

        driver, said = start(words)
        wait_for(lambda: "waiting for machines" in said(), driver, said)
        assert "want room for 2 workers of 1 CPUs each, the cluster has it for 1" in said()
        ray_start(second, f"--address={first.address}:6379")
        assert driver.wait(300) == 0, said()
    assert said().count("waiting for machines") == 1
    assert set(states(short / "out").values()) == {"finished"}


def test_gpus_that_join_take_over(short):
    """A machine with a GPU, or so it says, joins a run on CPUs: the work goes there, and its subject is not blamed."""
    words = [*write_small(short, "hold-a:dog b:dog"), "--out", short / "out"]
    words[words.index("--workers") + 1] = "1"
    (short / "out").mkdir()
    (short / "out" / "hold").touch()
    poison = os.pathsep.join([str(ROOT / "tests/fleet/poison"), environment()["PYTHONPATH"]])
    with cluster(short, PYTHONPATH=poison) as (first, second, start):
        driver, said = start(words)
        wait_for((short / "out" / "held").exists, driver, said)
        ((before,),) = ask(short / "out", "SELECT node FROM workers")
        ray_start(second, f"--address={first.address}:6379", "--num-gpus=1")
        lost = "SELECT reason FROM attempts WHERE cause='lost'"
        wait_for(lambda: ask(short / "out", lost), driver, said)
        assert "GPUs have joined" in ask(short / "out", lost)[0][0]
        (short / "out" / "hold").unlink()
        after = "SELECT node FROM workers WHERE node IS NOT NULL"
        wait_for(lambda: ask(short / "out", after) not in ([], [(before,)]), driver, said)
        assert driver.wait(300) == 0, said()
    assert set(states(short / "out").values()) == {"finished"}
    assert ask(short / "out", "SELECT sum(failures), sum(losses) FROM subjects") == [(0, 1)]
