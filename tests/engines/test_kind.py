"""Which engine `engine.kind: auto` is."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.engines.kind import resolved_engine
from dbtrain.errors import ConfigError, DataError, StopRequested
from dbtrain.fleet.forgetting import forget
from dbtrain.results.publish import LORA_FILE
from dbtrain.results.record import finished_record
from dbtrain.settings.recipes import load
from dbtrain.train import train_manifest
from dbtrain.training.session import Watch
from dbtrain.values import Subject
from tests.kit.main_job import small_config, write_job

AUTO = "engine.kind=auto"


def of(*words, ranks=1, device="cuda", subjects=()):
    settings, why = resolved_engine(load("tiny", (AUTO, *words)), ranks, device, subjects)
    return settings.engine.kind, settings.engine.packed.size, why


def test_a_lora_in_one_process_is_a_pack_of_one_on_a_gpu():
    assert load("tiny").engine.kind == "auto"
    assert of() == ("packed", 1, "packed: a LoRA in one process, whose step the GPU can record")
    assert of("engine.packed.size=4")[:2] == ("packed", 4)
    assert of(device="cpu") == ("zero", "auto", "zero: one process on a CPU, where nothing can be recorded")


@pytest.mark.parametrize(
    "words, size, why",
    [
        (("engine.packed.size=4",), 4, "engine.packed is set"),
        (("train.stop_loss=0.1",), 1, "train.stop_loss is for packs"),
        (("model.quantize=int8",), 1, "model.quantize is for packs"),
    ],
)
def test_what_only_a_pack_can_do_is_a_pack_on_a_cpu_too(words, size, why):
    assert of(*words, device="cpu") == ("packed", size, f"packed: {why}")


@pytest.mark.parametrize(
    "words, ranks, why",
    [
        ((), 2, "2 processes share each subject"),
        (("train.method=full",), 1, "train.method must be lora"),
        (("engine.zero.stage=3",), 1, "engine.zero is set"),
        (("data.buckets=true",), 1, "data.buckets is on"),
        (("train.batch=2", "train.micro_batch=1"), 1, "train.micro_batch is 1"),
    ],
)
def test_what_a_pack_cannot_do_goes_through_deepspeed(words, ranks, why):
    kind, _, reason = of(*words, ranks=ranks)
    assert kind == "zero" and reason.startswith(f"zero: {why}")


def test_priors_of_some_subjects_go_through_deepspeed():
    rex, tom = (Subject(name, "dog", (), prior_weight=weight) for name, weight in (("rex", None), ("tom", 0.5)))
    kind, _, why = of("prior.weight=0", subjects=(rex, tom))
    assert (kind, why) == ("zero", "zero: tom has a prior_weight while prior.weight is 0")
    assert of("prior.weight=0", subjects=(rex,))[0] == of(subjects=(rex, tom))[0] == "packed"


def test_a_kind_that_was_asked_for_stays():
    for kind in ("zero", "packed"):
        config = load("tiny", (f"engine.kind={kind}",))
        assert resolved_engine(config, 1, "cuda") == (config, "")


def test_what_only_a_pack_can_do_is_refused_at_several_processes_before_anything_is_loaded():
    config = load("tiny", (AUTO, "train.stop_loss=0.1"))
    with pytest.raises(ConfigError, match=r"train.stop_loss: .*engine.kind: auto is zero here: 2 processes"):
        resolved_engine(config, 2, "cuda")
    with pytest.raises(ConfigError, match=r"train.stop_loss"):
        load("tiny", (AUTO, "train.stop_loss=0.1", "train.method=full"))


@pytest.mark.parametrize(
    "words, environment, line",
    [
        ((), {}, "engine: auto here is zero: one process on a CPU, where nothing can be recorded"),
        (("engine.packed.size=2",), {"WORLD_SIZE": "4"}, "engine: auto here is zero: 4 processes share each subject"),
        (("engine.kind=packed",), {}, "engine: packed, as engine.kind says"),
    ],
)
def test_a_plan_says_which_engine_and_why(words, environment, line, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_job(tmp_path, subjects="rex:dog")
    out = tmp_path / "out"
    command = ["train", str(tmp_path / "photos.csv"), "--config", "tiny", "--subjects", "all", "--out", str(out)]
    told = CliRunner(env=environment).invoke(cli.app, [*command, "--plan", *words])
    assert (told.exit_code, told.stdout, out.exists()) == (0, f"{line}\n", False), told.output


class Run:
    """A run of two subjects with `engine.kind: auto`, in a folder of its own. packed: as on a GPU, a pack of one."""

    def __init__(self, folder: Path, out: str):
        self.manifest, self.out = folder / "photos.csv", folder / out

    def train(self, steps: int, packed: bool, only=None, watch=None):
        small = ("sample.images=0", "data.resolution=16", "lora.rank=1", "prior.weight=0", "checkpoint.last=true")
        size = ["engine.packed.size=1"] if packed else []
        config = small_config(*small, AUTO, f"train.steps={steps}", *size)
        records, failed = train_manifest(self.manifest, config, self.out, only, quiet=True, watch=watch)
        assert not failed
        return {record["subject"]: (record["engine"], record["begun_at"]) for record in records}

    def weights(self, name: str = "rex"):
        assert finished_record(self.out / "subjects" / name)
        return load_file(self.out / "subjects" / name / LORA_FILE)


def equal(ours, theirs, rtol=0.0):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 10)


def test_a_run_under_auto_is_stopped_resumed_trained_on_and_forgotten(tmp_path):
    """In one engine with the same bits, and from one into the other with the same result."""
    write_job(tmp_path, subjects="rex:dog tom:dog")
    whole, run = Run(tmp_path, "whole"), Run(tmp_path, "run")
    assert whole.train(6, packed=True) == {"rex": ("packed", 0), "tom": ("packed", 0)}

    def press(subject, step, steps, values):
        if subject == "tom" and step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested, match="1 subjects under way"):
        run.train(4, packed=True, watch=Watch(quiet=True, logged=press))
    left = {path.parents[1].name: path.name for path in run.out.glob("subjects/*/checkpoints/step-*")}
    assert left["tom"] in ("step-00000001", "step-00000002")
    assert run.train(4, packed=True)["tom"] == ("packed", int(left["tom"][-1]))
    assert run.train(6, packed=True) == {"rex": ("packed", 4), "tom": ("packed", 4)}
    for name in ("rex", "tom"):
        equal(run.weights(name), whole.weights(name))
    assert run.train(8, packed=False) == {"rex": ("zero", 6), "tom": ("zero", 6)}
    assert whole.train(8, packed=True, only=["rex"]) == {"rex": ("packed", 6)}
    equal(run.weights(), whole.weights(), rtol=1e-4)
    forget(run.out, ["tom"])
    assert not (run.out / "subjects" / "tom").exists()
    assert list(run.train(10, packed=True)) == ["rex"]
    with pytest.raises(DataError, match="'tom' was forgotten here"):
        run.train(10, packed=True, only=["tom"])
