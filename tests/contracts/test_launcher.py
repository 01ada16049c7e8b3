"""What every launcher promises: a pure text under a golden file, refusals before sending, help with an example.

To see a changed text: `dbtrain launch NAME ... --dry-run` with the words of `CASES`; copy it to the golden file when
the change is meant.
"""

import inspect
import os
import shlex
import stat
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.errors import ConfigError
from dbtrain.verbs.launch import verb
from dbtrain_launchers import LAUNCHERS
from dbtrain_launchers.plan import VISIBLE, Launcher, LaunchPlan, Rendered, make_plan
from tests.kit.injections import CANARY, TEXTS

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
EXAMPLES = {"kubernetes": ROOT / "configs" / "cluster" / "rayjob.yaml"}
BATCH = [
    "batch",
    "run",
    "all photos.csv",
    "--config",
    "sdxl_lora",
    "--out",
    "/shared/it's",
    "sample.prompts=['a {subject}']",
]
TRAIN = ["train", "photos.csv", "--subject", "rex", "--config", "tiny", "--out", "/shared/rex"]
CASES = {
    "deepspeed": (["--gpus", "8", "--nodes", "2", "--hostfile", "hosts", "--master-port", "29600"], TRAIN),
    "deepspeed_here": (["--gpus", "2", "--env", "NCCL_DEBUG=INFO x"], TRAIN),
    "deepspeed_no_ssh": (
        ["--hostfile", "hosts", "--no-ssh", "--node-rank", "1", "--master-addr", "10.0.0.1"],
        TRAIN,
    ),
    "ray": (["--address", "http://head:8265", "--wheel", "dbtrain.whl", "--env", "NCCL_DEBUG=INFO x"], BATCH),
    "ray_folder": (["--working-dir", ".", "--exclude", "/scratch", "--submission-id", "one"], TRAIN),
    "slurm": (
        ["--nodes", "4", "--gpus", "8", "--cpus", "64", "--time", "12:00:00", "--partition", "gpu", "--memory", "200G"]
        + ["--env", "NCCL_DEBUG=INFO x"],
        BATCH,
    ),
    "slurm_ranks": (["--nodes", "2", "--gpus", "8", "--cpus", "64", "--account", "lab", "--qos", "high"], TRAIN),
    "slurm_array": (["--gpus", "1", "--array", "0-9%4"], ["train", "parts/{task}.csv", "--subjects", "all"]),
    "kubernetes": (
        ["--nodes", "4", "--gpus", "8", "--cpus", "32", "--memory", "200Gi", "--image", "registry.example/dbtrain:1"]
        + ["--claim", "data:/data", "--head-claim", "ledger:/ledger", "--secret", "HF_TOKEN=hub/token"]
        + ["--ray-version", "2.60.0", "--env", "NCCL_DEBUG=INFO $(x)", "--namespace", "lab"],
        ["batch", "run", "/data/all.csv", "--config", "sdxl_lora", "--out", "/data/runs/it's", "--ledger", "/ledger"],
    ),
}
COMPANIONS = {"exclude": {"working_dir": Path(".")}}
REQUIRED = {"kubernetes": {"image": "registry.example/dbtrain:1"}}


@pytest.fixture(autouse=True)
def every_gpu_is_visible(monkeypatch):
    """Golden texts and documented lines are those of a shell that names no GPUs."""
    monkeypatch.delenv(VISIBLE, raising=False)


def run(*words: str):
    return CliRunner().invoke(app, ["launch", *words])


def rendered(name: str, plan: LaunchPlan, **options):
    return LAUNCHERS[name].render(plan, **{**REQUIRED.get(name, {}), **own_defaults(name), **options})


def own_defaults(name: str) -> dict:
    parameters = list(inspect.signature(LAUNCHERS[name].render).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def text_options(name: str) -> dict:
    """A launcher's own options that take text, each with the function that makes its value of a text."""
    hints = get_type_hints(LAUNCHERS[name].render)
    values = {str: str, Path: Path, list[str]: lambda text: [text]}
    options = {}
    for option in list(inspect.signature(LAUNCHERS[name].render).parameters)[1:]:
        kinds = [hints[option]] if hints[option] in values else get_args(hints[option])
        options.update((option, values[kind]) for kind in kinds if kind in values)
    return options


def shipped(case: str) -> Path:
    """Where a case's text is kept: an example that is shipped, or a golden file."""
    return EXAMPLES.get(case, GOLDEN / f"launch_{case}.txt")


def test_every_launcher_has_a_golden_case():
    assert {case.split("_")[0] for case in CASES} == set(LAUNCHERS)


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_the_golden_one(case):
    options, words = CASES[case]
    result = run(case.split("_")[0], *options, "--dry-run", "--", *words)
    assert result.exit_code == 0, result.output
    assert result.output == shipped(case).read_text("utf-8")


def test_a_row_is_all_that_a_new_launcher_needs():
    """Its verb has the plan's options that the row names, and the options of its own `render`."""

    def render(plan: LaunchPlan, *, queue: Annotated[str, typer.Option(help="Queue.")] = "short") -> Rendered:
        """Run in a queue."""
        return Rendered(("submit", queue, str(plan.gpus), *plan.words))

    started = []
    own = typer.Typer()
    own.command(context_settings={"allow_interspersed_args": False})(
        verb(Launcher(render, ("gpus",), lambda rendered: started.append(rendered) or 7))
    )
    text = CliRunner().invoke(own, ["--help"]).output
    assert "Run in a queue." in text and "--queue" in text and "--nodes" not in text
    result = CliRunner().invoke(own, ["--gpus", "3", "--queue", "long", "--", *TRAIN])
    assert (result.exit_code, started) == (7, [Rendered(("submit", "long", "3", *TRAIN))])


def documented() -> list[str]:
    """Every complete `dbtrain launch` line of docs/operations.md."""
    text = (ROOT / "docs" / "operations.md").read_text("utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    dbtrain launch ")]
    return [line for line in lines if not line.endswith("...")]


@pytest.mark.parametrize("line", documented())
def test_the_documented_lines_work(line):
    words = shlex.split(line)[2:]
    words.insert(1, "--dry-run")
    result = run(*words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_dry_run_starts_nothing(name, tmp_path, monkeypatch):
    """Programs that would be started leave a mark."""
    for program in ("deepspeed", "env", "sbatch", "kubectl", "ray", "python", "ssh", "pdsh"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/{CANARY}\n")
        (tmp_path / program).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    options = [word for key, value in REQUIRED.get(name, {}).items() for word in (f"--{key}", value)]
    assert run(name, *options, "--dry-run", "--", *TRAIN).exit_code == 0
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rendering_is_pure(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan(TRAIN)
    assert rendered(name, plan) == rendered(name, plan)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_has_an_example_and_the_words_last(name):
    text = run(name, "--help").output
    assert f"dbtrain launch {name}" in text
    assert " -- " in text


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("words", [["generate", "x"], ["batch", "status"], ["doctor"], ["--help"]])
def test_only_runs_are_launched(name, words):
    options = [word for key, value in REQUIRED.get(name, {}).items() for word in (f"--{key}", value)]
    result = run(name, *options, "--dry-run", "--", *words)
    assert (result.exit_code, "only `train` and `batch run`" in result.output) == (2, True)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_secrets_are_refused_before_anything_is_rendered(name):
    options = [word for key, value in REQUIRED.get(name, {}).items() for word in (f"--{key}", value)]
    result = run(name, *options, "--env", "HF_TOKEN=hf_abcdefghijklmnopqrstuvwx", "--dry-run", "--", *TRAIN)
    assert result.exit_code == 2
    assert "hf_abcdef" not in result.output


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_text_option_says_more_than_a_value(name):
    """Each text option takes each evil text: it is refused, or the text stays inside one value of the document."""
    options = text_options(name)
    assert options
    for option, as_value in options.items():
        for evil in [*TEXTS, "-x", "a\nb"]:
            value = as_value(evil)
            try:
                made = rendered(name, make_plan(TRAIN), **{**COMPANIONS.get(option, {}), option: value})
            except ConfigError:
                continue
            assert holds_as_one_value(made, evil), (option, evil)


def holds_as_one_value(made, evil: str) -> bool:
    """Whether the evil text is a whole word of the command, or a whole string of a JSON or YAML document."""
    import yaml

    if any(evil in word for word in made.command):
        return True
    documents = list(yaml.safe_load_all(made.stdin)) if made.stdin else []
    return any(text == evil or text.strip("/") == evil.strip("/") for text in strings(documents))


def strings(value):
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value
