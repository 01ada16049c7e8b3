"""A cluster of two hosts, attacked as reliability.md section 3 has it: open heads, secrets in what Ray shows and keeps.

Real Ray, real jobs. Disguised commands in words, names and variables are in tests/launchers/test_shells.py.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kit.main_job import write_job
from tests.kit.two_hosts import missing, missing_job_api, ray_on, two_hosts, write_token

WHY_NOT = missing() or missing_job_api()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "two hosts with Ray"),
]
CANARY = "canary7secret7canary"
SECRETS = {
    "HF_TOKEN": f"hf_{CANARY}aaaaaaaa",
    "WANDB_API_KEY": f"{CANARY}bbbbbbbb",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}cccccccc",
    "DB_PASSWORD": CANARY,
}
"""What a person's shell and a node's environment hold."""


@pytest.fixture(scope="module")
def short():
    """A folder with a short name: Ray's sockets have at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="dbs-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ran(short):
    """A run through the job API of a guarded cluster whose nodes and submitter hold secrets; what was seen of it."""
    words = write_job(short, "train.steps=2", "sample.images=0", subjects="rex:dog tom:dog")
    seen = {}
    token = write_token(short / "token")
    with two_hosts(**SECRETS) as hosts, ray_on(hosts, short / "ray", token) as address:
        first, second = hosts
        command = ["launch", "ray", "--address", address, "--env", "PLAIN=value", "--", "batch", "run", *words]
        done = first.dbtrain(*command, "--out", short / "out", cwd=short, timeout_s=300)
        seen["run"] = done.stdout
        assert done.returncode == 0, done.stdout[-4000:]
        for name, words in {
            "jobs": ask(f"{address}/api/jobs/", token),
            "stranger": ask(f"{address}/api/jobs/", None),
            "stranger's job": ask(f"{address}/api/jobs/", None, json.dumps({"entrypoint": f"touch {short}/obeyed"})),
            "wrong token": ask(f"{address}/api/jobs/", short / "wrong"),
            "doctor": [sys.executable, "-m", "dbtrain", "doctor", "--json"],
        }.items():
            (short / "wrong").write_text("0" * 48)
            second.variables["RAY_TMPDIR"] = str(short)
            seen[name] = second.run(*words, timeout_s=120, stderr=-3).stdout
        seen["logs"] = "".join(
            path.read_text("utf-8", "replace") for path in (short / "ray").rglob("*") if path.is_file()
        )
    seen["token"] = token.read_text()
    return seen


ASK = """
import sys, urllib.error, urllib.request
address, token, body = sys.argv[1:]
headers = {"Authorization": "Bearer " + open(token).read()} if token else {}
request = urllib.request.Request(address, body.encode() or None, {**headers, "Content-Type": "application/json"})
try:
    print(urllib.request.urlopen(request, timeout=20).read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
"""


def ask(address: str, token: Path | None, body: str = "") -> list[str]:
    """A command that asks the job API as somebody with a token file, or as a stranger."""
    return [sys.executable, "-c", ASK, address, str(token or ""), body]


def test_a_secret_is_nowhere(ran, short):
    """Job API, job log, Ray's own logs, and every file of the run: ledger, records, cards, settings, shards, logs."""
    assert "PLAIN" in ran["jobs"]
    assert len(ran["logs"]) > 10_000
    assert "finished" in ran["run"]
    hits = [name for name in ("run", "jobs", "logs", "doctor") if CANARY in ran[name]]
    files = [path for path in (short / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert hits + [str(path) for path in files if CANARY.encode() in path.read_bytes()] == []


def test_the_clusters_token_is_nowhere_but_in_its_file(ran, short):
    places = {name: text for name, text in ran.items() if name != "token"}
    assert [name for name, text in places.items() if ran["token"] in text] == []
    files = [path for path in short.rglob("*") if path.is_file() and path.name != "token"]
    assert [str(path) for path in files if ran["token"].encode() in path.read_bytes()] == []


def test_a_stranger_is_told_nothing_and_obeyed_in_nothing(ran, short):
    assert (ran["stranger"].strip(), ran["stranger's job"].strip(), ran["wrong token"].strip()) == ("401", "401", "403")
    assert not (short / "obeyed").exists()


def test_doctor_finds_a_guarded_head_sound(ran):
    assert states(ran["doctor"], "ray head") == ["ok"]


def states(report: str, name: str) -> list[str]:
    return [check["state"] for check in json.loads(report) if check["name"] == name]


def test_an_open_head_is_refused_and_found(short):
    """What Ray starts by default lets a stranger run a command; neither the launcher nor the doctor lets that pass."""
    with two_hosts(RAY_TMPDIR=str(short)) as hosts, ray_on(hosts, short / "ray", None) as address:
        first, second = hosts
        job = ["launch", "ray", "--address", address, "--", "train", "photos.csv", "--config", "tiny", "--out", "x"]
        refused = second.dbtrain(*job, cwd=short)
        doctor = first.dbtrain("doctor", "--json", cwd=short, stderr=-3)
        stranger = second.run(*ask(f"{address}/api/jobs/", None))
    assert (refused.returncode, "CVE-2023-48022" in refused.stdout) == (5, True)
    assert (doctor.returncode, states(doctor.stdout, "ray head")) == (1, ["fail"])
    assert stranger.stdout.strip() == "[]", "the head was not open, or it ran something"
