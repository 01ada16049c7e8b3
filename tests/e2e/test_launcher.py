"""Two ranks, real processes, gloo, learn what one rank learns, at every ZeRO stage; and by the real `deepspeed`.

Tolerances. Two ranks add the same fp32 terms in another order, which changes a gradient by some roundings (2^-23) of
its largest terms. With AdamW's eps at 1e-3 an update has slope at most lr / eps = 1 in the gradient, so weights stay
within steps * 1e-6 of each other and losses within a relative 1e-5.
"""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dbtrain.results.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from dbtrain.results.identity import Identity
from tests.e2e.every_stage import train_all, train_plan
from tests.kit.forked import free_port, ranks
from tests.kit.main_job import ROOT, environment, sd_folder, small_config, write_job

# Seconds each on an idle machine; a busy one has shown thirty times that.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEADY = ("train.eps=1e-3", "train.steps=3", "sample.images=0", "train.ema=0.5", "publish.dtype=fp32")
COMBINATIONS = list(product(range(4), ("lora", "full")))
LOSS_REL, WEIGHT_ABS = 1e-5, 5e-6
LORA_FILE = "pytorch_lora_weights.safetensors"


def launch(words: list[str], *options: str) -> list[str]:
    """The launcher's command line, as a user types it."""
    script = Path(sys.executable).parent / "deepspeed"
    return [sys.executable, str(script), *options, "--master_port", str(free_port()), *map(str, words)]


def plan(folder: Path, count: int) -> list[dict]:
    """All stages and methods; sampling in mid-training and a checkpoint are on where they cost least."""
    entries = []
    for stage, method in COMBINATIONS:
        words = [*STEADY, f"train.method={method}", f"engine.zero.stage={stage}", "checkpoint.every_steps=2"]
        if (stage, method) == (3, "lora"):
            words += ["sample.images=1", "sample.every_steps=2"]
        entries.append(
            {
                "manifest": str(folder / "photos.csv"),
                "out": str(folder / f"out-{count}-{stage}-{method}"),
                "config": small_config(*words).model_dump(mode="json"),
            }
        )
    return entries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two ranks and one rank through the same plan; `write_job`'s files and all outputs."""
    made = tmp_path_factory.mktemp("launcher")
    write_job(made, subjects="rex:dog")
    (made / "plan.json").write_text(json.dumps(plan(made, 2)))
    ranks(2, train_plan, made / "plan.json")
    # One rank is this process, and needs no more than stage 0: test_zero.py shows that stages agree within a process.
    train_all([entry for entry in plan(made, 1) if "-0-" in entry["out"]])
    return made


def subject(folder: Path, ranks: int, stage: int, method: str) -> Path:
    return folder / f"out-{ranks}-{stage}-{method}" / "subjects" / "rex"


def log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    file = path / LORA_FILE
    return load_file(file if file.exists() else path / "model" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("stage", "method"), COMBINATIONS)
def test_two_ranks_learn_what_one_rank_learns(folder, stage, method):
    one, two = subject(folder, 1, 0, method), subject(folder, 2, stage, method)
    assert json.loads((two / "record.json").read_text())["world_size"] == 2
    got, want = log(two), log(one)
    assert [row["step"] for row in got] == [row["step"] for row in want] == [1, 2, 3]
    for name in ("loss", "loss_instance", "loss_prior", "grad_norm"):
        assert [row[name] for row in got] == pytest.approx([row[name] for row in want], rel=LOSS_REL), name
    got, want = weights(two), weights(one)
    assert got.keys() == want.keys()
    worst = max(float((got[name] - want[name]).abs().max()) for name in want)
    assert worst <= WEIGHT_ABS


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_moved_the_weights(folder, method):
    """Else the comparison above would compare starting points."""
    state = newest(folder, 1, 0, method).state
    moved = max(float((weight - state["ema"][name]).abs().max()) for name, weight in state["master"].items())
    assert moved > 20 * WEIGHT_ABS


def run_of(folder: Path, ranks: int, stage: int, method: str) -> str:
    return json.loads((subject(folder, ranks, stage, method) / "record.json").read_text())["run"]


def newest(folder: Path, ranks: int, stage: int, method: str) -> Checkpoint:
    root = subject(folder, ranks, stage, method) / "checkpoints"
    return read_checkpoint(latest_checkpoint(root, Identity(run_of(folder, ranks, stage, method)))[0])


@pytest.mark.parametrize(("stage", "method"), COMBINATIONS)
def test_checkpoints_of_two_ranks_are_those_of_one(folder, stage, method):
    """Masters, moments and EMA whole, whatever the sharding; the run's name does not know ranks or stages."""
    run = run_of(folder, 1, 0, method)
    assert run_of(folder, 2, stage, method) == run
    one, two = newest(folder, 1, 0, method), newest(folder, 2, stage, method)
    assert one.step == two.step == 2
    assert one.state.keys() == two.state.keys() == {"master", "exp_avg", "exp_avg_sq", "ema"}
    for kind, tensors in one.state.items():
        for name, tensor in tensors.items():
            assert two.state[kind][name].shape == tensor.shape
            assert float((two.state[kind][name] - tensor).abs().max()) <= WEIGHT_ABS, (kind, name)


def test_stage_3_samples_while_it_trains(folder):
    assert (subject(folder, 2, 3, "lora") / "step-000002.png").exists()
    assert (subject(folder, 2, 3, "lora") / "samples.png").exists()


def test_the_plain_command_on_several_nodes(folder, tmp_path):
    """`deepspeed launchers/train.py` as typed, by two launchers of one rank each, which meet by address: the bits of
    two ranks of one launcher."""
    words = [ROOT / "launchers" / "train.py", folder / "photos.csv", "--config", folder / "small.yaml"]
    words += [f"model.path={sd_folder()}", *STEADY, "engine.zero.stage=2", "train.method=lora"]
    words += ["--subject", "rex", "--out", tmp_path / "nodes", "--json"]
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    options = ("--hostfile", str(tmp_path / "hosts"), "--no_ssh", "--master_addr", "127.0.0.1")
    command = launch(words, *options, "--node_rank")
    at = command.index("--node_rank") + 1
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [
        subprocess.Popen([*command[:at], str(rank), *command[at:]], env=environment(), cwd=ROOT, **pipes)
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=800)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(text[-3000:] for text in outputs)
    record = json.loads((tmp_path / "nodes" / "subjects" / "rex" / "record.json").read_text())
    assert (record["world_size"], record["zero_stage"]) == (2, 2)
    assert "".join(outputs).count('"world_size": 2') == 1, "one rank speaks"
    got, want = weights(tmp_path / "nodes" / "subjects" / "rex"), weights(subject(folder, 2, 2, "lora"))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
