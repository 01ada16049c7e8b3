"""CUDA_VISIBLE_DEVICES where a run is launched: the named GPUs are used or refused, and never others in their place."""

import base64
import json
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.errors import ConfigError
from dbtrain_launchers.plan import VISIBLE, make_plan
from tests.contracts.test_launcher import rendered
from tests.kit.main_job import environment

TRAIN = ["train", "photos.csv"]
BATCH = ["batch", "run", "photos.csv"]


def deepspeed_command(visible: str | None, gpus: int, env: tuple[str, ...] = (), **options) -> list[str]:
    """The words before dbtrain's own of what `launch deepspeed` would start."""
    command = list(rendered("deepspeed", make_plan(TRAIN, env, visible, gpus=gpus), **options).command)
    return command[: command.index("--module")]


HIDDEN = ["env", "-u", VISIBLE, "deepspeed"]


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 0, ["deepspeed"]),
        (None, 2, ["deepspeed", "--num_gpus", "2"]),
        ("1,3", 2, [*HIDDEN, "--include", "localhost:1,3"]),
        ("1,3", 0, [*HIDDEN, "--include", "localhost:1,3"]),
        ("1,3", 1, [*HIDDEN, "--include", "localhost:1"]),
        ("3,1", 2, [*HIDDEN, "--include", "localhost:3,1"]),
        (" 1, 3 ", 2, [*HIDDEN, "--include", "localhost:1,3"]),
        ("0", 1, [*HIDDEN, "--include", "localhost:0"]),
    ],
)
def test_deepspeed_gets_the_named_gpus(visible, gpus, expected):
    assert deepspeed_command(visible, gpus) == expected


def test_a_variable_of_the_run_counts_before_that_of_the_shell():
    command = deepspeed_command("0,1", 2, (f"{VISIBLE}=1,3", "A=b"))
    assert command == ["env", "-u", VISIBLE, "A=b", "deepspeed", "--include", "localhost:1,3"]


@pytest.mark.parametrize(
    ("visible", "gpus", "part"),
    [
        ("1,3", 4, "--gpus 4: .*names only 2"),
        ("", 0, "hides all GPUs"),
        ("", 2, "hides all GPUs"),
        ("-1", 1, "hides all GPUs"),
        ("NoDevFiles", 1, "hides all GPUs"),
        ("GPU-5ebe9f43-ac33420d4628", 1, "by number only"),
        ("MIG-GPU-b1028956-cfa2-0990-bf4a-5da9abb51763/3/0", 1, "by number only"),
        ("0,GPU-5ebe9f43", 2, "by number only"),
        ("0,-1,1", 1, "by number only"),
        ("0,1,", 2, "by number only"),
        ("\u0661", 1, "by number only"),
        ("1,1", 1, "twice"),
        ("1,01", 2, "twice"),
    ],
)
def test_deepspeed_refuses_what_it_would_not_use(visible, gpus, part):
    with pytest.raises(ConfigError, match=part):
        deepspeed_command(visible, gpus)


@pytest.mark.parametrize(
    ("visible", "gpus", "fine"),
    [("0,1,2,3", 2, True), ("0,1", 2, True), ("1,3", 2, False), ("0,1", 0, False), ("1,0", 2, False), (None, 2, True)],
)
def test_hosts_take_the_first_gpus_or_are_refused(visible, gpus, fine):
    """DeepSpeed passes no GPU's number on to a host."""
    for options in ({}, {"no_ssh": True, "node_rank": 0, "master_addr": "10.0.0.1"}):
        if not fine:
            with pytest.raises(ConfigError, match="of every host"):
                deepspeed_command(visible, gpus, hostfile=Path("hosts"), **options)
            continue
        command = deepspeed_command(visible, gpus, hostfile=Path("hosts"), **options)
        assert command[:5] == ["deepspeed", "--hostfile", "hosts", "--num_gpus", "2"]


def test_the_shells_variable_reaches_the_launcher(monkeypatch):
    monkeypatch.setenv(VISIBLE, "1,3")
    result = CliRunner().invoke(app, ["launch", "deepspeed", "--gpus", "2", "--dry-run", "--", *TRAIN])
    assert shlex.split(result.output)[:6] == [*HIDDEN, "--include", "localhost:1,3"]


@pytest.mark.parametrize(
    ("name", "gpus", "words", "assigned"),
    [
        ("slurm", 2, TRAIN, True),
        ("slurm", 0, TRAIN, False),
        ("kubernetes", 2, BATCH, True),
        ("kubernetes", 0, BATCH, False),
        ("ray", 0, BATCH, True),
        ("ray", 0, TRAIN, False),
    ],
)
def test_a_cluster_that_assigns_gpus_is_not_contradicted(name, gpus, words, assigned):
    """`train` as a Ray job runs in the job's own process: the variable holds there."""
    plan = make_plan(words, [f"{VISIBLE}=1,3"], gpus=gpus)
    if assigned:
        with pytest.raises(ConfigError, match=f"--env {VISIBLE}: .* assigns the GPUs"):
            rendered(name, plan)
    else:
        assert VISIBLE in rendered(name, plan).stdin


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "ray"])
def test_a_cluster_does_not_see_the_shells_variable(name):
    """It names GPUs of this machine; a cluster's machines have others."""
    assert rendered(name, make_plan(BATCH, visible="1,3")) == rendered(name, make_plan(BATCH))


def test_deepspeeds_own_runner_starts_ranks_on_the_named_gpus(tmp_path):
    """The real runner on a machine that counts four devices (LOCAL_SIZE says so to DeepSpeed on a CPU)."""
    ranks = tmp_path / "ranks"
    ranks.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    ranks.chmod(stat.S_IRWXU)
    command = list(rendered("deepspeed", make_plan(TRAIN, visible="1,3", gpus=2)).command)
    program = command.index("deepspeed")
    code = f"import sys; sys.executable = {str(ranks)!r}; from deepspeed.launcher.runner import main; main()"
    command[program : program + 1] = [sys.executable, "-c", code]
    variables = {**environment(), "LOCAL_SIZE": "4", VISIBLE: "1,3"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    world = next(word for word in (tmp_path / "words").read_text().split() if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world.partition("=")[2])) == {"localhost": [1, 3]}
    assert "ignoring" not in done.stdout
