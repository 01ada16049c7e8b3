"""Runs over two hosts with networks of their own: Ray through its job API, DeepSpeed with and without ssh.

A cut host is given up after some seconds (`QUICK_RAY`), and the run goes on with the other one. Nothing is compared
with a tolerance: what a run over two hosts learns is in test_launcher.py.
"""

import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from dbtrain.fleet.lease import NAME, find_ledger
from tests.kit.main_job import write_job
from tests.kit.two_hosts import missing, missing_job_api, ray_on, two_hosts, write_token

WHY_NOT = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "two hosts"),
]
SUBJECTS = [f"s{number:02d}" for number in range(6)]


@pytest.fixture
def short():
    """A folder with a short name: Ray's sockets have at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="dbt-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition, what: str, timeout_s: float = 240):
    """The first true value of a condition."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.2)
    return value


def records(out: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("subjects/*/record.json")}


@pytest.mark.skipif(bool(missing_job_api()), reason=missing_job_api() or "job API")
def test_a_fleet_over_two_hosts_outlives_one_of_them(short):
    """`dbtrain launch ray` submits `batch run`; in the middle one host's cable is pulled and all of it killed."""
    words = write_job(short, "train.steps=12", "sample.images=0", subjects=" ".join(f"{s}:dog" for s in SUBJECTS))
    out = short / "out"
    with two_hosts() as hosts, ray_on(hosts, short / "ray", write_token(short / "token")) as address:
        first, second = hosts
        command = ["launch", "ray", "--address", address, "--", "batch", "run", *words, "--out", out, "--unit", "1"]
        job = first.start(sys.executable, "-m", "dbtrain", *command, cwd=short)
        wait_for(
            lambda: job.poll() is not None or (len(attempts(out, None)) == 2 and attempts(out, "finished")),
            "a finished subject, and one under way on each host",
        )
        assert job.poll() is None, job.communicate()[0]
        before = set(records(out))
        second.cut()
        second.kill()
        output, _ = job.communicate(timeout=400)
        assert job.returncode == 0, output[-4000:]
        again = first.dbtrain(*command, cwd=short)
    assert again.returncode == 0, again.stdout
    assert before < set(SUBJECTS), "the host was cut after the run had ended"
    assert set(records(out)) == set(SUBJECTS)
    assert attempts(out, "finished") == dict.fromkeys(SUBJECTS, 1)
    assert attempts(out, "waiting"), "no attempt ended with its worker: the host that was cut had nothing to do"


def attempts(out: Path, outcome: str | None) -> Counter[str]:
    """Number of attempts with an outcome (None: under way) by subject; empty before there is a ledger."""
    if not (find_ledger(out) / NAME).exists():
        return Counter()
    with closing(sqlite3.connect(find_ledger(out) / NAME, timeout=30)) as db:
        rows = "SELECT id FROM attempts JOIN subjects USING (position) WHERE outcome IS ?"
        return Counter(name for (name,) in db.execute(rows, (outcome,)))


def one_rank_a_host(short: Path, hosts) -> Path:
    (short / "hosts").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    return short / "hosts"


def test_deepspeed_starts_a_rank_on_each_host_without_ssh(short):
    words = write_job(short, "sample.images=0", "engine.zero.stage=2", subjects="rex:dog")
    with two_hosts() as hosts:
        options = ["--hostfile", one_rank_a_host(short, hosts), "--no-ssh", "--master-addr", hosts[0].address]
        ranks = [
            host.start(sys.executable, "-m", "dbtrain", "launch", "deepspeed", *options, "--node-rank", number, "--",
                       "train", *words, "--subject", "rex", "--out", short / "out", cwd=short)
            for number, host in enumerate(hosts)
        ]  # fmt: skip
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert records(short / "out")["rex"]["world_size"] == 2


SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
"""
SSH = """
Host *
  IdentityFile {folder}/user
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking accept-new
"""


@pytest.mark.skipif(not (shutil.which("pdsh") and shutil.which("/usr/sbin/sshd")), reason="needs pdsh and sshd")
def test_deepspeed_reaches_both_hosts_by_ssh(short):
    """The real launcher, pdsh, ssh and an sshd on each host."""
    words = write_job(short, "sample.images=0", subjects="rex:dog")
    os.makedirs("/run/sshd", exist_ok=True)
    (short / "config").write_text(SSH.format(folder=short))
    (short / "bin").mkdir()
    (short / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {short}/config "$@"\n')
    (short / "bin" / "ssh").chmod(0o755)
    # What ssh does not pass on; DeepSpeed reads it from here.
    (short / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=cable0\nHF_HUB_OFFLINE=1\nOMP_NUM_THREADS=1\n")
    with two_hosts() as hosts:
        first = hosts[0]
        for key in ("host", "user"):
            first.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", short / key)
        for host in hosts:
            (short / f"sshd-{host.name}").write_text(SSHD.format(folder=short, address=host.address))
            host.start("/usr/sbin/sshd", "-D", "-f", short / f"sshd-{host.name}")
        first.variables["PATH"] = f"{short / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = first.dbtrain("launch", "deepspeed", "--hostfile", one_rank_a_host(short, hosts), "--master-addr",
                             first.address, "--", "train", *words, "--subject", "rex", "--out", short / "out",
                             cwd=short, timeout_s=300)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert records(short / "out")["rex"]["world_size"] == 2


def test_a_stop_request_reaches_the_ranks_and_their_code_comes_back(short):
    """DeepSpeed's own launcher would end with 1 or die, and leave ranks behind."""
    words = write_job(short, "sample.images=0", "train.steps=500", subjects="rex:dog")
    with two_hosts() as hosts:
        command = ["launch", "deepspeed", "--gpus", "2", "--", "train", *words, "--subject", "rex"]
        run = hosts[0].start(sys.executable, "-m", "dbtrain", *command, "--out", short / "out", cwd=short)
        log = short / "out" / "subjects" / "rex" / "log.jsonl"
        wait_for(lambda: run.poll() is not None or log.exists(), "a step")
        launcher = next(pid for pid in hosts[0].pids() if b"\0launch\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(launcher, signal.SIGTERM)
        output, _ = run.communicate(timeout=200)
        assert (run.returncode, "stopped on request" in output) == (75, True), output[-3000:]
        assert hosts[0].pids() == []
