"""A real SLURM of two nodes on this machine: ranks over nodes, a stop before the time limit, a Ray cluster inside.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge (no service has to run). GPUs, cgroups, accounting and
machines that really are several are not part of it.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.kit.forked import free_port
from tests.kit.main_job import environment, write_job

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
PATHS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
ABSENT = [name for name in PROGRAMS if shutil.which(name, path=PATHS) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(ABSENT) or os.geteuid() != 0, reason=f"needs root and SLURM; missing: {ABSENT}"),
]
CONF = """
ClusterName=dbtrain
SlurmctldHost={host}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=2000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A folder to work in, and a way to run a command as a user of the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and parent.name.startswith(("pytest", "slurm")):
            parent.chmod(0o755)
    (folder / "state").mkdir()
    with open(os.open(folder / "key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(secrets.token_bytes(128))
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    ports = dict(zip(("port", "first", "second"), (free_port() for _ in range(3))))
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, **ports))
    variables = {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}
    variables["PATH"] = f"{variables['PATH']}:/usr/sbin:/sbin"

    def run(*words, check=True):
        done = subprocess.run(list(map(str, words)), env=variables, cwd=folder, capture_output=True, text=True,
                              timeout=60, check=False)  # fmt: skip
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    files = {name: f"{folder}/munge.{name}" for name in ("sock", "pid", "log", "seed")}
    run("munged", "--force", f"--key-file={folder}/key", f"--socket={files['sock']}", f"--pid-file={files['pid']}",
        f"--log-file={files['log']}", f"--seed-file={files['seed']}")  # fmt: skip
    try:
        run("slurmctld")
        run("slurmd", "-N", "n1")
        run("slurmd", "-N", "n2")
        yield folder, run
    finally:
        run("scancel", "--signal=KILL", "--full", "--state=RUNNING", check=False)
        run("scontrol", "shutdown", check=False)
        time.sleep(2)
        for path in folder.glob("*.pid"):
            try:
                os.kill(int(path.read_text()), signal.SIGTERM)
            except (ProcessLookupError, ValueError):
                continue


def launch(run, name: str, *words, options=()) -> str:
    """The number of a job that was submitted by `dbtrain launch slurm`."""
    command = [sys.executable, "-m", "dbtrain", "launch", "slurm", "--nodes", "2", "--python", sys.executable]
    return run(*command, "--name", name, "--log", f"{name}.log", *options, "--", *words).split()[-1]


def wait_for(run, job: str, condition, timeout_s: float = 300) -> None:
    """Waits until a condition on a job's description holds."""
    end = time.monotonic() + timeout_s
    while not condition(text := run("scontrol", "show", "job", job)):
        assert time.monotonic() < end, text
        time.sleep(0.5)


def test_a_run_stops_before_its_limit_is_requeued_and_goes_on(slurm):
    """USR1 to the batch shell, as SLURM sends it; the job gives 75, waits again, and ends after all its steps."""
    folder, run = slurm
    words = write_job(folder / "ranks", "train.steps=150", "sample.images=0", subjects="rex:dog")
    job = launch(run, "ranks", "train", *words, "--subject", "rex", "--out", folder / "its out")
    log = folder / "its out" / "subjects" / "rex" / "log.jsonl"
    wait_for(run, job, lambda text: log.exists() and log.stat().st_size > 0)
    run("scancel", "--signal=USR1", "--batch", job)
    wait_for(run, job, lambda text: "Restarts=1" in text and "JobState=PENDING" in text)
    stopped = len(log.read_text().splitlines())
    assert 0 < stopped < 150
    time.sleep(2)  # slurmd refuses credentials of the second in which it revoked the former ones
    run("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(run, job, lambda text: "JobState=COMPLETED" in text or "JobState=FAILED" in text)
    record = json.loads((log.parent / "record.json").read_text())
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert (record["world_size"], steps) == (2, list(range(1, 151)))
    assert "stopped on request" in (folder / "ranks.log").read_text()


def test_a_fleet_runs_in_a_ray_cluster_of_the_allocation(slurm):
    folder, run = slurm
    words = write_job(folder / "fleet", "sample.images=0", subjects="rex:dog tom:cat")
    job = launch(run, "fleet", "batch", "run", *words, "--out", folder / "all", options=["--cpus", "2"])
    wait_for(run, job, lambda text: "JobState=COMPLETED" in text or "JobState=FAILED" in text)
    log = (folder / "fleet.log").read_text()
    assert sorted(path.name for path in (folder / "all" / "subjects").iterdir()) == ["rex", "tom"], log[-4000:]
    assert "2 finished of 2" in log
    assert not list(folder.glob(".ray-token-*"))
