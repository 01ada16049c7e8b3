"""Packed runs in one process, from manifest to artefacts: as the same subjects one by one, through failure and stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dbtrain.errors import DataError, EngineError, StopRequested
from dbtrain.models.sampling import draw_samples
from dbtrain.packing import loop
from dbtrain.packing.pack import Pack
from dbtrain.priors.own_images import import_images
from dbtrain.results.publish import LORA_FILE
from dbtrain.results.record import read_record
from dbtrain.settings.recipes import load, render
from dbtrain.subjects.manifest import read_manifest
from dbtrain.train import train_manifest, train_subjects
from dbtrain.training.bank import Bank
from dbtrain.training.session import Watch, join_run, open_work
from tests.kit.main_job import environment, small_config, write_job

SINGLE = 2e-5
"""float32, products summed in another order; relative to how far the weights moved where that is the smaller."""
PACKED = ("engine.kind=packed", "engine.packed.size=2")
ROWS = """subject,class,images,steps,lr,seed,rank,prior_weight
rex,dog,rex,6,,7,,
tom,cat,tom,,3e-3,,3,0.25
ben,dog,ben,3,,,1,
ada,dog,ada,,,,,2.5
"""


@pytest.fixture(autouse=True)
def signals_as_before():
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A manifest of four subjects that differ in all that a subject can have of its own."""
    folder = tmp_path_factory.mktemp("job")
    write_job(folder, subjects="rex:dog tom:cat ben:dog ada:dog")
    (folder / "photos.csv").write_text(ROWS)
    return folder


def words(job, *more):
    return (f"prior.store={job / 'priors'}", "train.clip_norm=0.02", "train.ema=0.8", *more)


def train(job, out, *more, names=None, failing=()):
    records, failed = train_manifest(job / "photos.csv", small_config(*words(job, *more)), job / out, names, quiet=True)
    assert failed.keys() == set(failing), failed
    return {record["subject"]: record for record in records}


@pytest.fixture(scope="module")
def solo(job):
    return train(job, "solo", "train.schedule=cosine"), job / "solo"


@pytest.fixture(scope="module")
def packed(job):
    return train(job, "packed", *PACKED, "train.schedule=cosine"), job / "packed"


def adapter(out, name):
    return load_file(out / "subjects" / name / LORA_FILE)


def gap(ours, theirs):
    """Relative difference of all matrices; those of B start at zero, so they are what training made."""
    assert ours.keys() == theirs.keys()
    parts = [[key for key in ours if half in key] for half in (".lora_A.", ".lora_B.")]
    return max(((flat(ours, part) - flat(theirs, part)).norm() / flat(theirs, part).norm()).item() for part in parts)


def flat(state, keys):
    return torch.cat([state[key].flatten().double() for key in keys])


def test_a_packed_run_gives_what_solo_runs_give(solo, packed):
    for name in ("rex", "tom", "ben", "ada"):
        assert gap(adapter(packed[1], name), adapter(solo[1], name)) < SINGLE, name
        rows = [(root / "subjects" / name / "log.jsonl").read_text().splitlines() for _, root in (packed, solo)]
        logs = [[json.loads(line) for line in lines] for lines in rows]
        assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
        assert logs[0][0].keys() == logs[1][0].keys() - {"stop"}
        for ours, theirs in zip(*logs):
            for key in ("loss", "loss_instance", "loss_prior", "grad_norm", "lr"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
        norms = [row["grad_norm"] for row in logs[0]]
        assert sum(norm > 0.02 for norm in norms) > len(norms) / 2


def test_auto_is_a_pack_of_one_with_the_same_result(job, solo, capsys):
    """And goes on from, and to, what DeepSpeed's engine left: one digest names both."""
    more = ("engine.kind=auto", "engine.packed.size=1", "train.schedule=cosine")
    records = train(job, "auto-kind", *more, names=["tom", "ben"])
    for name, record in records.items():
        assert (record["engine"], record["pack_size"]) == ("packed", 1)
        assert record["run"] == solo[0][name]["run"]
        assert gap(adapter(job / "auto-kind", name), adapter(solo[1], name)) < SINGLE, name
        files = [root / "subjects" / name / "log.jsonl" for root in (job / "auto-kind", solo[1])]
        logs = [file.read_text().splitlines() for file in files]
        for ours, theirs in zip(*[[json.loads(line) for line in lines] for lines in logs], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    train_manifest(job / "photos.csv", small_config(*words(job, *more)), job / "auto-kind", ["ben"])
    assert "engine: auto is packed: engine.packed is set" in capsys.readouterr().err


def test_captions_of_each_photo_train_in_a_pack_as_alone(job, tmp_path):
    shutil.copytree(job / "rex", tmp_path / "rex")
    for number, text in enumerate(("{subject} on a shelf", "[trigger] asleep")):
        (tmp_path / "rex" / f"{number}.txt").write_text(text)
    (tmp_path / "photos.csv").write_text("subject,class,images,steps\nrex,dog,rex,3\n")
    results = {}
    for kind, more in {"alone": (), "together": PACKED}.items():
        settings = (*words(job, *more), "data.caption_dropout=0.3", "train.schedule=cosine")
        config = small_config(*settings)
        (record,), _ = train_manifest(tmp_path / "photos.csv", config, tmp_path / kind, None, quiet=True)
        assert record["caption"].endswith("dog on a shelf")
        results[kind] = adapter(tmp_path / kind, "rex")
    assert gap(results["together"], results["alone"]) < SINGLE


def test_what_is_published_has_the_same_form(solo, packed):
    for name, record in packed[0].items():
        folders = [root / "subjects" / name for _, root in (packed, solo)]
        mine, other = (
            {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} for folder in folders
        )
        assert mine == other
        on_disk, alone = map(read_record, folders)
        assert on_disk == {**record, **{key: on_disk[key] for key in ("files", "sizes", "samples")}}
        assert on_disk.keys() - alone.keys() == {"pack_size"} and alone.keys() <= on_disk.keys()
        assert (on_disk["engine"], alone["engine"], on_disk["pack_size"]) == ("packed", "zero", 2)
        assert on_disk["run"] == alone["run"]  # one may go on with the other's checkpoints
        config = load(folders[0] / "config.yaml")
        assert config.model_copy(update={"engine": load(folders[1] / "config.yaml").engine}) == load(
            folders[1] / "config.yaml"
        )
    assert {name: record["steps"] for name, record in packed[0].items()} == {"rex": 6, "tom": 4, "ben": 3, "ada": 4}


def test_every_record_says_what_its_subject_cost(packed):
    for record in packed[0].values():
        stages = record["stages_s"]
        assert stages.keys() >= {"load", "prior", "capture", "encode", "train", "sample"}
        assert all(seconds >= 0 for seconds in stages.values()) and stages["train"] > 0
    shares = [record["stages_s"]["load"] for record in packed[0].values()]
    assert max(shares) == min(shares)


def test_again_is_nothing_and_other_neighbours_change_no_byte(job, packed, monkeypatch):
    drawn = []
    monkeypatch.setattr(loop, "draw_samples", lambda *asked, rows, **more: drawn.append((asked[1], rows))
                        or draw_samples(*asked, rows=rows, **more))  # fmt: skip
    again = train(job, "packed", *PACKED, "train.schedule=cosine")
    assert again == {name: read_record(packed[1] / "subjects" / name) for name in packed[0]}
    assert not drawn
    train(job, "reversed", *PACKED, "train.schedule=cosine", names=["ada", "ben", "tom", "rex"])
    # Each subject's pictures are drawn by the row in which it sat: ben ends first, and tom takes row 1 after him.
    row_of = {prompt.split()[3]: row for prompts, rows in drawn for prompt, row in zip(prompts, rows, strict=True)}
    assert [row_of[packed[0][name]["identifier"]] for name in ("ada", "ben", "tom")] == [0, 1, 1]
    for name in packed[0]:
        ours, theirs = adapter(job / "reversed", name), adapter(packed[1], name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_text_encoders_train_packed_too(job):
    """Each subject's captions go through its own row of the text encoder, at a rate of its own."""
    text = ("train.text_encoder=true", "train.text_encoder_lr=3e-4", "train.ema=null", "sample.images=0")
    train(job, "solo-text", *text, names=["tom", "ben"])
    train(job, "packed-text", *PACKED, *text, names=["tom", "ben"])
    for name in ("tom", "ben"):
        ours, theirs = adapter(job / "packed-text", name), adapter(job / "solo-text", name)
        assert any(key.startswith("text_encoder.") for key in ours)
        assert gap(ours, theirs) < SINGLE
        half = {key: value for key, value in theirs.items() if key.startswith("text_encoder.") and "lora_B" in key}
        assert flat(half, half).norm() > 0


def test_bf16_trains_as_solo_does(job):
    """Both compute in bf16 from fp32 masters; sums of another order differ by bf16's 2^-8 here and there."""
    half = ("train.precision=bf16", "sample.images=0", "train.ema=null")
    train(job, "solo-half", *half, names=["ben"])
    train(job, "packed-half", *PACKED, *half, names=["ben"])
    assert gap(adapter(job / "packed-half", "ben"), adapter(job / "solo-half", "ben")) < 0.1


def poison(monkeypatch, subject: str, step: int) -> None:
    """From `step` on, a subject's samples are NaN."""
    draw = Bank.draw

    def poisoned(self, now, slots):
        batch = draw(self, now, slots)
        if self.subject == subject and now >= step:
            batch.images_BCHW.fill_(torch.nan)
        return batch

    monkeypatch.setattr(Bank, "draw", poisoned)


def test_a_nan_ends_its_subject_and_leaves_the_others_as_they_were(job, packed, monkeypatch):
    poison(monkeypatch, "tom", 2)
    more = ("train.schedule=cosine", "checkpoint.every_steps=1", "track.every_steps=2")
    records, failed = train_manifest(
        job / "photos.csv", small_config(*words(job, *PACKED, *more)), job / "nan", None, quiet=True
    )
    assert {record["subject"] for record in records} == {"rex", "ben", "ada"}
    assert failed.keys() == {"tom"} and "step 3: the loss or its gradient is not finite" in str(failed["tom"])
    assert "Lower train.lr" in str(failed["tom"])
    for name in ("rex", "ben", "ada"):
        ours, theirs = adapter(job / "nan", name), adapter(packed[1], name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    checkpoints = job / "nan" / "subjects" / "tom" / "checkpoints"
    assert max(path.name for path in checkpoints.iterdir()) == "step-00000002"
    assert all(
        tensor.isfinite().all() for tensor in load_file(max(checkpoints.iterdir()) / "state.safetensors").values()
    )
    assert read_record(job / "nan" / "subjects" / "tom") is None


@pytest.mark.parametrize("names", [None, ["rex", "tom"]], ids=["others wait", "all are seated"])
def test_a_stop_request_checkpoints_every_row_and_the_rest_ends_in_the_same_bytes(job, packed, monkeypatch, names):
    batch, out = Pack.batch, f"stopped-{len(names or ())}"

    def stopping(self, banks):
        if any(step == 2 for _, _, step in banks):
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, banks)

    monkeypatch.setattr(Pack, "batch", stopping)
    config = small_config(*words(job, *PACKED, "train.schedule=cosine"))
    with pytest.raises(StopRequested, match="2 subjects under way"):
        train_manifest(job / "photos.csv", config, job / out, names, quiet=True)
    monkeypatch.undo()
    for name in ("rex", "tom"):
        (left,) = (job / out / "subjects" / name / "checkpoints").iterdir()
        assert left.name == "step-00000003"
    train(job, out, *PACKED, "train.schedule=cosine", names=names)
    for name in names or packed[0]:
        ours, theirs = adapter(job / out, name), adapter(packed[1], name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_a_solo_checkpoint_goes_on_in_a_pack(job, solo):
    """The checkpoint of record knows no engine: three steps alone, the rest in a pack."""
    config = small_config(*words(job, "train.schedule=cosine", "checkpoint.every_steps=3"))
    import dbtrain.training.job as module

    with pytest.MonkeyPatch.context() as patch:
        made = module.train_step

        def stopping(engine, runner, bank, plan, step, scale, stop):
            values = made(engine, runner, bank, plan, step, scale, stop)
            stop.asked = step >= 3
            return values

        patch.setattr(module, "train_step", stopping)
        with pytest.raises(StopRequested):
            train_manifest(job / "photos.csv", config, job / "mixed", ["rex"], quiet=True)
    train(job, "mixed", *PACKED, "train.schedule=cosine", names=["rex"])
    assert gap(adapter(job / "mixed", "rex"), adapter(solo[1], "rex")) < SINGLE


def test_a_writer_that_fails_is_heard(job, monkeypatch):
    from dbtrain.training.job import Job

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Job, "write", full)
    with pytest.raises(OSError, match="No space left"):
        train(job, "full", *PACKED, "sample.images=0", names=["ben"])
    assert read_record(job / "full" / "subjects" / "ben") is None


WITHOUT_DEEPSPEED = """
import sys
from pathlib import Path
import dbtrain.bench.pack, dbtrain.evaluate.protocol
from dbtrain.settings import recipes
from dbtrain.train import train_manifest
config = recipes.load(Path(sys.argv[1]))
records, failed = train_manifest(Path(sys.argv[2]), config, Path(sys.argv[3]), ["rex", "tom"], quiet=True)
print(len(records), failed, "deepspeed" in sys.modules)
"""


def test_a_pack_with_priors_needs_no_deepspeed(job, tmp_path):
    """It is half of what a process loads, and packs, class images, scores and benchmarks of packs use none of it."""
    (tmp_path / "packed.yaml").write_text(render(small_config(*PACKED, "train.steps=1", "sample.images=1")))
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, tmp_path / "packed.yaml", job / "photos.csv", tmp_path / "out"]
    done = subprocess.run([str(word) for word in command], env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["2 {} False"], done.stderr


def test_auto_measures_and_says_why(job, capsys):
    config = small_config(*words(job, "engine.kind=packed", "sample.images=0", "train.steps=1"))
    records, _ = train_manifest(job / "photos.csv", config, job / "auto", ["ben", "ada"])
    assert len(records) == 2 and {record["pack_size"] for record in records} <= {1, 2}
    assert "engine.packed.size: auto: " in capsys.readouterr().err


def test_priors_for_some_are_refused_before_anything_trains(job):
    with pytest.raises(DataError, match="prior_weight: subject tom: is 0.25 while prior.weight is 0"):
        train(job, "none", *PACKED, "prior.weight=0")


def test_a_class_without_priors_fails_alone(job, tmp_path):
    """As solo: dogs have imported priors and cats have none."""
    import_images(job / "rex", "dog", tmp_path / "store", small_config())
    own = ("prior.sampler=imported", f"prior.store={tmp_path / 'store'}", "prior.images=2", "sample.images=0")
    for engine in ((), PACKED):
        config, out = small_config(*own, *engine), tmp_path / f"out-{len(engine)}"
        records, failed = train_manifest(job / "photos.csv", config, out, ["tom", "rex", "ben"], quiet=True)
        assert {record["subject"] for record in records} == {"rex", "ben"} and failed.keys() == {"tom"}
        assert isinstance(failed["tom"], DataError) and "prior import" in str(failed["tom"])


def test_a_lost_adapter_is_made_again_with_its_classs_priors(job, tmp_path):
    """Whoever clears what a run drew, and an adapter with it: the same command mends it, the same in every bit."""
    config, out = small_config(*PACKED, "sample.images=0"), tmp_path / "out"
    train_manifest(job / "photos.csv", config, out, ["rex", "tom"], quiet=True)
    adapter = out / "subjects" / "tom" / LORA_FILE
    before = adapter.read_bytes()
    adapter.unlink()
    shutil.rmtree(out / "priors")
    records, failed = train_manifest(job / "photos.csv", config, out, ["rex", "tom"], quiet=True)
    assert len(records) == 2 and not failed and adapter.read_bytes() == before


def test_finished_is_told_as_soon_as_a_subject_is_on_disk(job):
    """In this thread, and while others still train; and no second of the whole is counted twice."""
    begun = time.perf_counter()
    config = small_config(*words(job, *PACKED, "sample.images=0", f"prior.store={job / 'told-priors'}"))
    subjects = read_manifest(job / "photos.csv")
    watch = Watch(quiet=True)
    base = join_run(config, watch)
    work, told = open_work(base, watch, subjects, (), job / "told", [subject.id for subject in subjects]), []

    def finished(subject, outcome):
        assert not isinstance(outcome, EngineError)
        assert read_record(work.out / "subjects" / subject.id)["run"] == outcome["run"]
        done = {path.parent.name for path in (work.out / "subjects").glob("*/record.json")}
        told.append((subject.id, done))

    train_subjects(base, work, watch, finished)
    assert {name for name, _ in told} == {"rex", "tom", "ben", "ada"}
    assert told[0][1] != {"rex", "tom", "ben", "ada"}
    spent = sum(sum(read_record(work.out / "subjects" / name)["stages_s"].values()) for name, _ in told)
    wall = time.perf_counter() - begun
    assert 0.8 * wall < spent < wall + 0.01
