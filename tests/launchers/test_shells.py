"""Run each rendered text in the shell that would run it, with words that are disguised commands: none may be obeyed.

The programs that the text starts (python, srun, scontrol, ray, pdsh) are stand-ins, which write down their words. The
shells, YAML and DeepSpeed's runner are real. tests/e2e has real SLURM (test_slurm.py), Ray and ssh (test_multinode.py).
"""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dbtrain.errors import ConfigError
from dbtrain_launchers import LAUNCHERS
from dbtrain_launchers.plan import make_plan
from tests.contracts.test_launcher import rendered
from tests.kit.injections import CANARY, ODD, TEXTS

WORDS = ("train", *TEXTS, *ODD)
BATCH_WORDS = ("batch", "run", *TEXTS, *ODD)
ENV = {f"V{number}": text for number, text in enumerate([*TEXTS, *ODD])}
RECORD = """#!/bin/bash
printf '%s\\0' "$@" >> {folder}/{name}.words
env -0 >> {folder}/{name}.env
"""
SRUN = """#!/bin/bash
while [ $# -gt 0 ]; do case "$1" in --*) shift ;; *) break ;; esac; done
case "$1" in hostname) echo 127.0.0.1 127.0.0.2 ;; *) exec "$@" ;; esac
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in "show hostnames") printf 'n1\\nn2\\n' ;; "show node") echo "NodeName=n1 NodeAddr=127.0.0.1 X=y" ;; esac
[ "$1" = requeue ] && echo "$2" >> {folder}/requeued
exit 0
"""
DONE_PYTHON = (
    RECORD + 'case "$*" in *health-check*) exit 0;; *"start --"*) sleep 5;; *-c*) echo x;; esac\nexit {code}\n'
)


@pytest.fixture
def place(tmp_path):
    """A folder to run in, with `bin/` first on the PATH and `words/` for what stand-ins were given."""
    for name in ("bin", "words", "run"):
        (tmp_path / name).mkdir()
    return tmp_path


def stand_in(place: Path, name: str, text: str, **values) -> None:
    path = place / "bin" / name
    path.write_text(
        text.replace("{folder}", str(place / "words"))
        .replace("{name}", name)
        .replace("{code}", str(values.get("code", 0)))
    )
    path.chmod(stat.S_IRWXU)


def obey(place: Path, command: list[str], stdin: str = "", **environ: str) -> subprocess.CompletedProcess:
    paths = {"PATH": f"{place / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(place)}
    return subprocess.run(
        command,
        input=stdin,
        cwd=place / "run",
        env={**paths, **environ},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def given(place: Path, name: str) -> list[str]:
    return (place / "words" / f"{name}.words").read_bytes().decode().split("\0")[:-1]


def variables(place: Path, name: str) -> dict[str, str]:
    pairs = (
        entry.split("=", 1) for entry in (place / "words" / f"{name}.env").read_bytes().decode().split("\0") if entry
    )
    return {key: value for key, value in pairs if key in ENV}


def nothing_obeyed(place: Path) -> None:
    assert [str(path) for path in place.rglob(CANARY)] == []


def slurm_environment(place: Path) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_SUBMIT_DIR": str(place / "run"),
    }


def run_slurm(place: Path, words, code: int = 0, **options):
    """The script under bash; python's words."""
    for name, text in (("python", DONE_PYTHON), ("srun", SRUN), ("scontrol", SCONTROL)):
        stand_in(place, name, text, code=code)
    made = rendered("slurm", make_plan(words, [f"{key}={value}" for key, value in ENV.items()], nodes=2), **options)
    assert obey(place, ["bash", "-n"], made.stdin).stderr == ""
    done = obey(place, ["bash", "-s"], made.stdin, **slurm_environment(place))
    return done, given(place, "python")


def test_slurm_ranks_get_the_words_and_variables_as_they_were_given(place):
    done, words = run_slurm(place, WORDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert words == ["-m", "dbtrain_launchers", *WORDS]
    assert variables(place, "python") == ENV
    nothing_obeyed(place)


def test_a_slurm_cluster_runs_the_words_on_its_head(place):
    done, words = run_slurm(place, BATCH_WORDS)
    assert done.returncode == 0, done.stderr
    start = words.index("dbtrain")
    assert words[start - 1 : start + 3 + len(BATCH_WORDS)] == [
        "-m",
        "dbtrain",
        "batch",
        "run",
        "--address",
        "auto",
        *BATCH_WORDS[2:],
    ]
    assert "--include-dashboard=false" in words
    assert not list((place / "run").glob(".ray-token-*"))
    nothing_obeyed(place)


def test_an_array_task_gets_its_number(place):
    _, words = run_slurm(place, WORDS, array="0-9")
    assert words[2:] == [word.replace("{task}", "3") for word in WORDS]
    nothing_obeyed(place)


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (4, False)])
def test_a_slurm_run_that_asks_for_it_is_requeued(place, code, requeued):
    done, _ = run_slurm(place, ["train", "x"], code=code)
    assert (done.returncode, (place / "words" / "requeued").exists()) == (code, requeued)


@pytest.mark.parametrize("words", [["train", "x"], ["batch", "run", "x"]])
def test_a_slurm_run_that_is_asked_to_stop_before_it_began_is_requeued_and_never_begins(place, words):
    """SLURM's signal comes while the script still looks for its nodes."""
    early = SCONTROL.replace("#!/bin/bash", '#!/bin/bash\n[ "$2" = hostnames ] && kill -USR1 $PPID')
    for name, text in (("python", DONE_PYTHON), ("srun", SRUN), ("scontrol", early)):
        stand_in(place, name, text)
    made = rendered("slurm", make_plan(words))
    done = obey(place, ["bash", "-s"], made.stdin, **slurm_environment(place))
    assert (done.returncode, (place / "words" / "requeued").exists()) == (75, True), done.stderr
    begun = given(place, "python") if (place / "words" / "python.words").exists() else []
    assert "x" not in begun


def test_a_ray_job_gets_the_words_through_its_shell(place):
    stand_in(place, "python", RECORD)
    made = rendered("ray", make_plan(WORDS, [f"{key}={value}" for key, value in ENV.items()]))
    request = json.loads(made.stdin)
    assert request["runtime_env"]["env_vars"] == ENV
    assert obey(place, ["sh", "-c", request["entrypoint"]]).stderr == ""
    assert given(place, "python") == ["-m", "dbtrain", *WORDS]
    nothing_obeyed(place)


def test_a_kubernetes_job_gets_the_words_through_both_of_its_shells(place):
    """KubeRay's submitter puts the entrypoint into a bash line; `ray job submit` quotes its words; the head runs sh."""
    stand_in(place, "python", RECORD)
    stand_in(place, "ray", RECORD)
    made = rendered("kubernetes", make_plan(WORDS, [f"{key}={value}" for key, value in ENV.items()]))
    job, _ = yaml.safe_load_all(made.stdin)
    line = f"ray job submit --address http://head:8265 -- {job['spec']['entrypoint'].strip()} ;"
    assert obey(place, ["bash", "-ce", line]).stderr == ""
    words = given(place, "ray")
    assert obey(place, ["sh", "-c", shlex.join(words[words.index("--") + 1 :])]).stderr == ""
    assert given(place, "python") == ["-m", "dbtrain", *WORDS]
    container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    got = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert {key: got[key].replace("$$(", "$(") for key in ENV} == ENV
    assert all("$(" not in got[key].replace("$$(", "") for key in ENV)
    nothing_obeyed(place)


def test_deepspeed_here_gets_the_words_as_they_were_given(place):
    stand_in(place, "deepspeed", RECORD)
    made = rendered("deepspeed", make_plan(WORDS, [f"{key}={value}" for key, value in ENV.items()]))
    assert obey(place, list(made.command)).stderr == ""
    assert given(place, "deepspeed") == ["--module", "dbtrain_launchers", *WORDS]
    assert variables(place, "deepspeed") == ENV
    # What is printed is what is run.
    assert shlex.split(made.text) == list(made.command)
    nothing_obeyed(place)


@pytest.mark.parametrize("word", [*TEXTS, "a\nb", "$HOME", "~", "*", "{a,b}", "it's", 'a "b"', "--x y", "#"])
def test_words_that_a_remote_shell_would_read_are_refused(word):
    with pytest.raises(ConfigError, match="cannot go through pdsh"):
        LAUNCHERS["deepspeed"].render(make_plan(["train", word]), hostfile=Path("hosts"), **NO_OPTIONS)


NO_OPTIONS = {"master_addr": None, "master_port": None, "ssh_port": None, "no_ssh": False, "node_rank": None}


def test_deepspeeds_own_runner_hands_the_other_words_on_unchanged(place):
    """The real runner with a pdsh that does what ssh does: it joins the words and gives them to the remote shell."""
    words = ("train", "/nfs/all photos.csv", "--subject", "rex", "train.lr=1e-3", "a/b:c@d+e", "sample text here")
    stand_in(place, "pdsh", '#!/bin/bash\nwhile [ "$1" != -w ]; do shift; done; shift 2\nexec bash -c "$*"\n')
    (place / "run" / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    made = LAUNCHERS["deepspeed"].render(
        make_plan(words, nodes=2), **{**NO_OPTIONS, "hostfile": Path("hosts"), "master_addr": "n1"}
    )
    stand_in(place, "launched", RECORD)
    code = (f"import sys; sys.executable = {str(place / 'bin' / 'launched')!r}; sys.argv = {list(made.command)!r}; "
            "sys.argv[1:1] = ['--no_ssh_check']; from deepspeed.launcher.runner import main; main()")  # fmt: skip
    done = obey(place, [sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr[-2000:]
    got = given(place, "launched")
    assert got[got.index("dbtrain_launchers") :] == ["dbtrain_launchers", *words]
    nothing_obeyed(place)
