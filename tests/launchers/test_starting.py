"""Starting what was rendered: programs that are missing, what reaches those that are there, heads that are refused."""

import json
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from dbtrain.errors import ConfigError, FleetError
from dbtrain_launchers import LAUNCHERS, on_deepspeed, on_ray, ray_head
from dbtrain_launchers.plan import Rendered, make_plan
from tests.contracts.test_launcher import rendered
from tests.kit.main_job import environment

PLAN = make_plan(["train", "photos.csv"])


def stand_in(folder: Path, name: str, code: int) -> None:
    """A program that writes down its words and its standard input."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/words\ncat > {folder}/stdin\nexit {code}\n')
    path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    ("name", "program"), [("deepspeed", "deepspeed"), ("slurm", "sbatch"), ("kubernetes", "kubectl")]
)
def test_a_missing_program_is_named(name, program, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FleetError, match=f"`{program}` is not found"):
        LAUNCHERS[name].start(rendered(name, PLAN))


@pytest.mark.parametrize(("name", "program", "code"), [("slurm", "sbatch", 0), ("kubernetes", "kubectl", 3)])
def test_a_program_gets_the_text_and_its_code_comes_back(name, program, code, monkeypatch, tmp_path):
    stand_in(tmp_path, program, code)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    made = rendered(name, PLAN)
    assert LAUNCHERS[name].start(made) == code
    assert (tmp_path / "stdin").read_text("utf-8") == made.stdin
    assert (tmp_path / "words").read_text().split() == list(made.command[1:])


def test_deepspeeds_code_comes_back(monkeypatch, tmp_path):
    stand_in(tmp_path, "deepspeed", 75)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert LAUNCHERS["deepspeed"].start(rendered("deepspeed", PLAN)) == 75


LAUNCHER = """#!/bin/sh
# As over ssh: the rank is no child of this launcher.
setsid "{python}" -c "{rank}" dbtrain_launchers --local_rank=0 train photos.csv --out x &
echo $! > {folder}/rank
wait $!
"""
RANK = (
    "import signal, time, pathlib; "
    "signal.signal(signal.SIGUSR1, lambda *_: exit(75)); "
    "pathlib.Path('{folder}/up').touch(); time.sleep(60)"
)
AWAY = "#!/bin/sh\necho > {folder}/up\nexec sleep 60\n"
START = (
    "import sys; from dbtrain_launchers.on_deepspeed import start_ranks; from dbtrain.errors import FleetError\n"
    "try: sys.exit(start_ranks([sys.argv[1], '--module', 'dbtrain_launchers', *sys.argv[2:]], 1.0))\n"
    "except FleetError as error: print(error); sys.exit(error.exit_code)\n"
)


def ask_to_stop(folder: Path, launcher: str) -> tuple[int, str]:
    """(code, output) of a launch that is asked to stop as soon as its stand-in for DeepSpeed is up."""
    rank = RANK.format(folder=folder)
    (folder / "deepspeed").write_text(launcher.format(folder=folder, python=sys.executable, rank=rank))
    (folder / "deepspeed").chmod(stat.S_IRWXU)
    command = [sys.executable, "-c", START, str(folder / "deepspeed"), "train", "photos.csv", "--out", "x"]
    started = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (folder / "up").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    started.terminate()
    return (started.wait(30), started.stdout.read())


def test_a_rank_of_another_parent_process_is_asked_to_stop(tmp_path):
    assert ask_to_stop(tmp_path, LAUNCHER) == (75, "")
    assert not Path(f"/proc/{(tmp_path / 'rank').read_text().strip()}").exists()


def test_a_request_that_reaches_no_rank_ends_the_launcher_and_says_so(tmp_path):
    code, output = ask_to_stop(tmp_path, AWAY)
    assert code == 5 and "no rank of this run is on this machine" in output


@pytest.mark.parametrize("line", ["-oProxyCommand=x slots=1", "$(x) slots=1", "host", "host slots=1; x", "a b slots=1"])
def test_hostfiles_hold_hosts_only(line, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(f"# all of them\n\nnode-1.lab slots=8 # first\n{line}\n")
    (found,) = on_deepspeed.hostfile_findings(path)
    assert f"{path}:4" in found


def test_a_missing_hostfile_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        on_deepspeed.hostfile_findings(tmp_path / "none")


@pytest.mark.parametrize(
    ("folder", "fine"), [("/shared/runs", True), ("/my runs", False), ("/a;b", False), ("/$(x)", False)]
)
def test_working_folders_that_a_remote_shell_would_read_are_refused(folder, fine):
    assert (on_deepspeed.folder_findings(folder) == []) is fine


def test_no_job_is_sent_to_an_open_head(monkeypatch):
    """Ray's client is never even asked for."""
    monkeypatch.setattr(ray_head, "head_state", lambda address: "open")
    monkeypatch.setattr(ray_head, "is_loopback", lambda host: False)
    request = Rendered(("POST", "http://head:8265/api/jobs/"), "{}")
    with pytest.raises(FleetError, match="CVE-2023-48022"):
        LAUNCHERS["ray"].start(request)


def test_no_head_is_an_error():
    with pytest.raises(FleetError, match="no Ray head answers"):
        LAUNCHERS["ray"].start(Rendered(("POST", "http://127.0.0.1:1/api/jobs/"), "{}"))


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("deepspeed", {"no_ssh": True}, "--no-ssh: needs"),
        ("ray", {"address": "head:8265"}, "--address"),
        ("ray", {"exclude": ["x"]}, "--exclude: needs --working-dir"),
        ("ray", {"working_dir": Path(".")}, "--out runs/a: lies in the folder that Ray unpacks"),
        ("ray", {"wheel": Path("x.whl")}, "--out runs/a: lies in the folder that Ray unpacks"),
        ("slurm", {"time": "soon"}, "--time"),
        ("slurm", {"array": "all"}, "--array"),
        ("kubernetes", {"memory": "lots"}, "--memory"),
        ("kubernetes", {"claim": ["data"]}, "--claim"),
        ("kubernetes", {"secret": ["HF_TOKEN"]}, "--secret"),
        ("kubernetes", {"ray_version": ""}, "--ray-version"),
    ],
)
def test_what_cannot_be_honoured_is_refused(name, options, part):
    with pytest.raises(ConfigError, match=part):
        rendered(name, make_plan(["train", "photos.csv", "--out", "runs/a"]), **options)


def test_a_fleet_is_nothing_for_deepspeed():
    with pytest.raises(ConfigError, match="batch run"):
        rendered("deepspeed", make_plan(["batch", "run", "x.csv"]))


def test_several_nodes_need_a_hostfile():
    with pytest.raises(ConfigError, match="--nodes 2"):
        rendered("deepspeed", make_plan(["train", "x"], nodes=2))


class Broken:
    """Ray's client for a job, with a log that breaks off before the job's end."""

    def __init__(self, *states):
        self.states = list(states)

    async def tail_job_logs(self, job):
        yield "first line\n"
        raise RuntimeError("closed")

    def get_job_info(self, job):
        status = self.states.pop(0)
        if status is None:
            raise ConnectionError("refused")
        return SimpleNamespace(status=status, driver_exit_code=75 if status.is_terminal() else None, message="")


def test_a_log_that_breaks_off_is_not_the_end_of_the_job(capsys):
    from ray.job_submission import JobStatus

    assert on_ray.follow(Broken(JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.FAILED), "job", 0.0) == 75
    written = capsys.readouterr()
    assert written.out == "first line\n" and "its log breaks off (closed)" in written.err
    with pytest.raises(FleetError, match="its head answers no more"):
        on_ray.follow(Broken(JobStatus.RUNNING, None), "job", 0.0)


@pytest.mark.parametrize("words", [["--out=a"], ["--out", "/a", "--ledger", "b"], ["--out", "./a"]])
def test_relative_results_are_found_in_every_form(words):
    assert len(on_ray.relative_findings(["batch", "run", "x.csv", *words, "a.b=--out"])) == 1
    assert on_ray.relative_findings(["batch", "run", "x.csv", "--out", "/a", "--ledger=/b"]) == []


def test_a_wheel_is_sent_as_a_folder_and_not_installed(tmp_path):
    """Ray installs a wheel in `py_modules` with its dependencies: gigabytes, on each machine."""
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("dbtrain/__init__.py", "")
    request = json.loads(rendered("ray", PLAN, wheel=tmp_path / "x.whl").stdin)
    with on_ray.unpacked(request) as sent:
        folder = Path(sent["runtime_env"]["working_dir"])
        assert (folder / "dbtrain" / "__init__.py").exists()
    assert not folder.exists()


def test_a_broken_wheel_is_an_error(tmp_path):
    (tmp_path / "x.whl").write_text("no zip")
    request = json.loads(rendered("ray", PLAN, wheel=tmp_path / "x.whl").stdin)
    with pytest.raises(FleetError, match="cannot be read"), on_ray.unpacked(request):
        pass
