"""A run that lives: rows and photos join, steps are added, and each result is that of a run that knew it all."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from dbtrain.errors import StopRequested
from dbtrain.results.record import finished_record
from dbtrain.storage.atomic import file_digest
from dbtrain.train import train_manifest
from dbtrain.training.job import Job
from tests.kit.main_job import photo, small_config, write_job

pytestmark = pytest.mark.timeout(900)
LORA = "pytorch_lora_weights.safetensors"
SMALL = ("sample.images=0", "data.resolution=16", "train.batch=1", "lora.rank=1", "prior.images=2", "prior.steps=1")
ENGINES: dict[str, tuple[str, ...]] = {"zero": (), "packed": ("engine.kind=packed", "engine.packed.size=2")}


@pytest.fixture(params=ENGINES)
def run(request, tmp_path):
    write_job(tmp_path, subjects="rex:dog tom:dog")
    return Run(tmp_path, ENGINES[request.param])


class Run:
    """A manifest that changes, and runs over it."""

    def __init__(self, folder, settings):
        small = ("train.steps=3", "checkpoint.every_steps=2", *SMALL, *settings)
        self.folder, self.settings = folder, small
        self.rows = (folder / "photos.csv").read_text().splitlines()

    def train(self, out, *overrides):
        """The ids and the error texts of a run over all rows."""
        (self.folder / "photos.csv").write_text("\n".join(self.rows) + "\n")
        config = small_config(*self.settings, *overrides)
        records, failed = train_manifest(self.folder / "photos.csv", config, self.folder / out, None, quiet=False)
        return [record["subject"] for record in records], {name: str(error) for name, error in failed.items()}

    def subject(self, out, name):
        return self.folder / out / "subjects" / name

    def weights(self, out, name):
        finished_record(self.subject(out, name))
        return load_file(self.subject(out, name) / LORA)

    def same(self, name, out="out", other="whole"):
        ours, theirs = self.weights(out, name), self.weights(other, name)
        return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_rows_and_photos_join_and_results_are_those_of_a_run_that_knew_them(run, capfd):
    run.train("out")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.subject("out", "tom").rglob("*")}
    priors = {path: path.stat().st_mtime_ns for path in (run.folder / "out" / "priors").rglob("*.tar")}
    (run.folder / "eve").mkdir()
    photo(70).save(run.folder / "eve" / "0.jpg")
    photo(71).save(run.folder / "rex" / "05.jpg")
    run.rows.insert(1, "eve,dog,eve")
    old = file_digest(run.subject("out", "rex") / LORA)
    records, failed = run.train("out")
    assert sorted(records) == ["eve", "rex", "tom"] and not failed
    told = capfd.readouterr().err
    assert "rex: photos have joined it; it is trained anew" in told and "tom: already finished" in told
    assert file_digest(run.subject("out", "rex") / LORA) != old
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in before if path.exists()}
    assert priors == {path: path.stat().st_mtime_ns for path in priors}
    run.train("whole")
    assert all(run.same(name) for name in ("eve", "rex", "tom"))
    del run.rows[1]
    assert sorted(run.train("out")[0]) == ["rex", "tom"] and finished_record(run.subject("out", "eve"))


def test_more_steps_go_on_from_the_state_and_the_old_result_stays_until_then(run, monkeypatch, capfd):
    run.train("out")
    old, write, kept = file_digest(run.subject("out", "rex") / LORA), Job.write, []

    def writing(self, state, record, sheet):
        kept.append(finished_record(self.folder)["steps"])
        write(self, state, record, sheet)

    monkeypatch.setattr(Job, "write", writing)
    run.train("out", "train.steps=6")
    told = capfd.readouterr().err
    assert kept == [3, 3] and "rex: goes on to step 6 instead of 3" in told and "resuming after step 2" in told
    monkeypatch.undo()
    run.train("whole", "train.steps=6")
    assert run.same("rex") and run.same("tom") and file_digest(run.subject("out", "rex") / LORA) != old
    failed = run.train("out", "train.steps=5")[1]
    assert "train.steps was 6, is 5" in failed["rex"]


def test_a_stopped_subject_goes_on_for_more_steps_and_a_decaying_schedule_is_told(tmp_path, monkeypatch, capfd):
    write_job(tmp_path, subjects="rex:dog")
    run, after_step = Run(tmp_path, ("train.schedule=linear",)), Job.after_step

    def pressing(self, engine, done, stop):
        if done == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, engine, done, stop)

    monkeypatch.setattr(Job, "after_step", pressing)
    with pytest.raises(StopRequested, match="after step 2"):
        run.train("out")
    monkeypatch.undo()
    refused = run.train("out", "train.lr=0.5")[1]["rex"]
    assert "train.lr was 0.001, is 0.5" in refused
    assert run.train("out", "train.steps=4")[0] == ["rex"]
    assert "train.schedule is linear: the rate of steps 1 to 2 fell as for 3 steps" in capfd.readouterr().err
