"""The main job in one process, from a manifest to artefacts: what comes out, and how one bad subject ends."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dbtrain.engines.zero import ZeroEngine
from dbtrain.errors import DataError, SubjectTaken, summed
from dbtrain.results.checkpoint import Checkpoint, save_checkpoint
from dbtrain.results.publish import read_lora
from dbtrain.results.record import read_record
from dbtrain.settings.recipes import load
from dbtrain.storage.atomic import LOCK, file_digest, held
from dbtrain.subjects import manifest
from dbtrain.subjects.forgotten import bury, change_pending
from dbtrain.subjects.manifest import read_manifest
from dbtrain.subjects.rows import read_rows
from dbtrain.train import train_manifest, train_subjects
from dbtrain.training import claims
from dbtrain.training.bank import Bank
from dbtrain.training.job import Job
from dbtrain.training.session import Watch, join_run, open_work
from dbtrain.training.step import TrainingStep
from tests.kit.main_job import sd_folder, small_config, write_job

LORA = "pytorch_lora_weights.safetensors"


def test_a_forgotten_subject_is_trained_no_more_and_a_forgetting_is_ended_first(tmp_path):
    write_job(tmp_path, subjects="rex:dog tom:cat")
    out = tmp_path / "out"
    out.mkdir()
    bury(out, ["tom"])
    with pytest.raises(DataError, match="'tom' was forgotten here on request"):
        train_manifest(tmp_path / "photos.csv", small_config(), out, ["tom"])
    change_pending(out, {"rex": ["rex"]})
    with pytest.raises(DataError, match="1 subjects are being forgotten"):
        train_manifest(tmp_path / "photos.csv", small_config(), out, None)


@pytest.fixture(autouse=True)
def signals_as_before():
    import signal

    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_job(folder, subjects="rex:dog tom:cat ben:dog")
    return folder


@pytest.fixture(scope="module")
def finished(job):
    """(output folder, records) of two subjects of one class and one of another."""
    config = small_config("publish.kohya=true", "sample.every_steps=2", "track.tensorboard=true")
    records, failed = train_manifest(job / "photos.csv", config, job / "out", None, quiet=True)
    assert not failed
    return job / "out", records


def test_every_subject_leaves_valid_artefacts(finished):
    out, records = finished
    assert [record["subject"] for record in records] == ["rex", "tom", "ben"]
    assert len({record["identifier"] for record in records}) == 3
    for record in records:
        folder = out / "subjects" / record["subject"]
        assert read_record(folder) == {
            **record,
            **{key: read_record(folder)[key] for key in ("files", "sizes", "samples")},
        }
        names = {LORA, "kohya_lora.safetensors", "samples.png"}
        assert read_record(folder)["files"] == {name: file_digest(folder / name) for name in names}
        weights, metadata = read_lora(folder)
        assert weights.rank == 2 and metadata["identifier"] == record["identifier"]
        state = load_file(folder / LORA)
        assert all(tensor.isfinite().all() for tensor in state.values())
        assert any(tensor.abs().max() > 0 for name, tensor in state.items() if ".lora_B." in name)
        assert Image.open(folder / "step-000002.png").size[0] >= 128
        assert (folder / "samples" / "samples" / "prompt-00-image-00.png").exists()
        assert f"`{record['identifier']} {record['class']}`" in (folder / "README.md").read_text()
        assert load(folder / "config.yaml") == small_config(
            "publish.kohya=true", "sample.every_steps=2", "track.tensorboard=true", "engine.kind=zero"
        )  # what `auto` is on a CPU
        assert list((folder / "tensorboard").glob("events.*"))


def test_the_log_is_strict_json_with_a_line_a_step(finished):
    out, records = finished

    def refuse(name):
        raise ValueError(name)

    for record in records:
        lines = (out / "subjects" / record["subject"] / "log.jsonl").read_text().splitlines()
        rows = [json.loads(line, parse_constant=refuse) for line in lines]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        for row in rows:
            assert row["loss"] == pytest.approx(row["loss_instance"] + row["loss_prior"], rel=1e-5)
            assert row["grad_norm"] > 0 and row["lr"] == 1e-3
        assert record["loss"] == rows[-1]["loss"]


def test_a_subject_does_not_depend_on_its_neighbours(finished, job):
    """Trained third or alone, in fp32: the same bytes, so nothing of a neighbour stays in the base."""
    out, _ = finished
    config = small_config("publish.kohya=true", "sample.every_steps=0")
    train_manifest(job / "photos.csv", config, job / "alone", ["ben"], quiet=True)
    assert file_digest(job / "alone/subjects/ben" / LORA) == file_digest(out / "subjects/ben" / LORA)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_neighbours_leave_no_trace_in_bf16_or_in_trained_weights(job, tmp_path, method):
    words = (f"train.method={method}", "train.precision=bf16", "train.steps=2", "publish.dtype=fp32", "sample.images=0")
    for out, names in (("both", ["rex", "tom"]), ("alone", ["tom"])):
        train_manifest(job / "photos.csv", small_config(*words), tmp_path / out, names, quiet=True)
    name = LORA if method == "lora" else "model/unet/diffusion_pytorch_model.safetensors"
    both, alone = (load_file(tmp_path / out / "subjects" / "tom" / name) for out in ("both", "alone"))
    assert all(torch.equal(both[key], alone[key]) for key in alone)


def test_a_full_model_loads_in_diffusers_with_the_trained_weights(job, tmp_path):
    from diffusers import StableDiffusionPipeline

    config = small_config("train.method=full", "train.steps=2", "train.ema=0.5", "prior.weight=0")
    (record,), _ = train_manifest(job / "photos.csv", config, tmp_path, ["rex"], quiet=True)
    folder = tmp_path / "subjects" / "rex"
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float16)
    base = StableDiffusionPipeline.from_pretrained(sd_folder(), torch_dtype=torch.float16)
    changed = {
        part: any(
            not torch.equal(a, b)
            for a, b in zip(getattr(pipeline, part).parameters(), getattr(base, part).parameters())
        )
        for part in ("unet", "vae", "text_encoder")
    }
    assert changed == {"unet": True, "vae": False, "text_encoder": False}
    assert not (tmp_path / "priors").exists()
    assert all(file_digest(folder / name) == digest for name, digest in read_record(folder)["files"].items())
    assert "model/unet/diffusion_pytorch_model.safetensors" in read_record(folder)["files"]
    assert "from_pretrained('./model')" in (folder / "README.md").read_text()
    assert record["method"] == "full"


def poison(monkeypatch, subject: str, step: int, forward=TrainingStep.forward) -> None:
    """From `step` on, the loss of one subject is NaN."""
    from dbtrain.randomness import stream_key

    key = torch.tensor([stream_key(0, subject)])

    def poisoned(self, batch, now):
        loss = forward(self, batch, now)
        return (
            loss
            if not torch.equal(self.key_N2, key) or now < step
            else type(loss)(loss.loss * math.nan, loss.per_sample_B, loss.weight_B)
        )

    monkeypatch.setattr(TrainingStep, "forward", poisoned)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_nan_stops_its_subject_at_the_last_good_state_and_no_other(job, tmp_path, monkeypatch, method):
    poison(monkeypatch, "rex", 2)
    config = small_config(f"train.method={method}", "checkpoint.every_steps=1", "sample.images=0", "publish.dtype=fp32")
    records, failed = train_manifest(job / "photos.csv", config, tmp_path, ["rex", "ben"], quiet=True)
    assert [record["subject"] for record in records] == ["ben"]
    assert failed.keys() == {"rex"}
    assert "step 3: the loss is nan" in str(failed["rex"]) and "Lower train.lr" in str(failed["rex"])
    assert sorted(path.name for path in (tmp_path / "subjects/rex/checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]
    assert read_record(tmp_path / "subjects" / "rex") is None
    monkeypatch.undo()
    train_manifest(job / "photos.csv", config, tmp_path / "alone", ["ben"], quiet=True)
    name = LORA if method == "lora" else "model/unet/diffusion_pytorch_model.safetensors"
    got, want = (load_file(root / "subjects" / "ben" / name) for root in (tmp_path, tmp_path / "alone"))
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_non_finite_gradient_stops_too(job, tmp_path, monkeypatch):
    """A finite loss can have an infinite gradient: the weights it would make must not become the result."""
    step = ZeroEngine.step

    def overflow(self, scale):
        next(iter(self.names.values())).grad.fill_(math.inf)
        return step(self, scale)

    monkeypatch.setattr(ZeroEngine, "step", overflow)
    config = small_config("checkpoint.every_steps=1", "sample.images=0", "train.steps=2")
    records, failed = train_manifest(job / "photos.csv", config, tmp_path, ["rex"], quiet=True)
    assert not records
    assert "step 1" in str(failed["rex"])
    assert not (tmp_path / "subjects/rex/checkpoints").exists()


SOLO_OR_PACKED = pytest.mark.parametrize("engine", [(), ("engine.kind=packed", "engine.packed.size=2")])


def outcomes(run) -> dict:
    told = {}
    train_subjects(*run, lambda subject, outcome: told.update({subject.id: outcome}))
    return told


def opened(job, out, *words):
    """Base, work and watch for three subjects, with their shards made."""
    config = small_config("train.steps=2", "sample.images=0", *words)
    subjects, watch = read_manifest(job / "photos.csv"), Watch(quiet=True)
    base = join_run(config, watch)
    return base, open_work(base, watch, subjects, (), out, ["rex", "tom", "ben"]), watch


@SOLO_OR_PACKED
def test_bad_data_of_one_subject_leaves_the_others_alone(job, tmp_path, engine):
    """A torn sample and a foreign checkpoint: each ends its own subject, with the code of bad data."""
    run = opened(job, tmp_path, *engine)
    row = run[1].index.entries_of("rex")[0]
    shard = tmp_path / "shards" / row.shard
    with shard.open("r+b") as file:
        file.seek(row.offset + 700)
        file.write(b"torn")
    save_checkpoint(tmp_path / "subjects" / "tom" / "checkpoints", Checkpoint(1, "b" * 64, {}), keep=1)
    told = outcomes(run)
    assert list(told) == ["rex", "tom", "ben"]
    assert type(told["rex"]) is type(told["tom"]) is DataError
    assert "sample rex-0-0: digest differs" in str(told["rex"]) and "other settings or data" in str(told["tom"])
    assert told["ben"]["subject"] == "ben"
    assert summed({name: told[name] for name in ("rex", "tom")}).exit_code == 3


@pytest.mark.parametrize("at", ["read", "write"])
def test_a_disk_that_refuses_ends_them_all(job, tmp_path, monkeypatch, at):
    import errno

    from dbtrain.data.location import Folder

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    run = opened(job, tmp_path)
    monkeypatch.setattr(*((Folder, "open") if at == "read" else (Job, "write")), refuse)
    told = {}
    with pytest.raises(OSError, match="Input/output error"):
        train_subjects(*run, lambda subject, outcome: told.update({subject.id: outcome}))
    assert told == {}


@SOLO_OR_PACKED
def test_a_subject_is_trained_by_one_process_at_a_time(job, tmp_path, engine, monkeypatch):
    run, seen, draw = opened(job, tmp_path, *engine), set(), Bank.draw
    monkeypatch.setattr(claims, "WAIT_S", 0.1)

    def looking(self, *words):
        with held(tmp_path / "subjects" / self.subject / LOCK) as free:
            seen.add((self.subject, free))
        return draw(self, *words)

    monkeypatch.setattr(Bank, "draw", looking)
    with held(tmp_path / "subjects" / "rex" / LOCK):
        told = outcomes(run)
    assert type(told["rex"]) is SubjectTaken
    assert seen == {("tom", False), ("ben", False)}
    for name in ("rex", "tom", "ben"):
        with held(tmp_path / "subjects" / name / LOCK) as free:
            assert free, name
    assert {name for name, outcome in outcomes(run).items() if isinstance(outcome, dict)} == set(told)


def test_an_unknown_subject_gets_a_hint_before_anything_is_loaded(job, tmp_path):
    with pytest.raises(DataError, match="no subject 'rxe'; did you mean 'rex'"):
        train_manifest(job / "photos.csv", small_config(), tmp_path / "out", ["tom", "rxe"])
    assert not (tmp_path / "out").exists()


def test_the_manifest_is_read_once(tmp_path, monkeypatch):
    write_job(tmp_path, subjects="rex:dog tom:cat")

    def read_and_remove(path):
        rows = read_rows(path)
        path.unlink()
        return rows

    monkeypatch.setattr(manifest, "read_rows", read_and_remove)
    config = small_config("train.steps=1", "sample.images=0")
    records, failed = train_manifest(tmp_path / "photos.csv", config, tmp_path / "out", ["tom"], quiet=True)
    assert [record["subject"] for record in records] == ["tom"] and not failed


def test_ready_made_shards_are_read_from_an_address_that_was_allowed(finished, job, tmp_path):
    """The same bytes as from the photos, which this manifest does not name; with what is missing named, or left out."""
    import fsspec

    bucket, manifest = fsspec.filesystem("memory"), tmp_path / "subjects.csv"
    bucket.put(f"{finished[0]}/shards", "/bucket/shards", recursive=True)
    manifest.write_text("subject,class\nben,dog\nrex,dog\neve,cat\n")
    words = ["publish.kohya=true", "data.shards=memory://bucket/shards"]
    allowed = small_config(*words, "data.schemes=[memory]")
    try:
        with pytest.raises(DataError, match="is an address; .* or allow its scheme"):
            train_manifest(manifest, small_config(*words), tmp_path / "refused", ["ben"], quiet=True)
        with pytest.raises(DataError, match="subject eve: holds no photo of it"):
            train_manifest(manifest, allowed, tmp_path / "out", ["ben"], quiet=True)
        larger = small_config(*words, "data.schemes=[memory]", "data.resolution=40")
        _, failed = train_manifest(manifest, larger, tmp_path / "40", ["ben"], quiet=True, skip_bad=True)
        assert "stored at 32 px, data.resolution is 40; make the shards at that" in str(failed["ben"])
        records, failed = train_manifest(manifest, allowed, tmp_path / "out", None, quiet=True, skip_bad=True)
    finally:
        bucket.rm("/bucket", recursive=True)
    assert not failed and [record["subject"] for record in records] == ["ben", "rex"]
    assert {path.name for path in (tmp_path / "out" / "shards").iterdir()} == {"skipped.json"}
    of_photos = {record["subject"]: record for record in finished[1]}
    for record in records:
        ours, theirs = (place / "subjects" / record["subject"] / LORA for place in (tmp_path / "out", finished[0]))
        assert record["run"] == of_photos[record["subject"]]["run"]
        assert file_digest(ours) == file_digest(theirs)


def test_photos_of_several_shapes_train_as_if_alone(tmp_path):
    """The class images are encoded once a shape, in the store too, whoever needs them first."""
    from tests.kit.main_job import photo

    sizes = {"rex": [(40, 64), (64, 40), (48, 48)], "tom": [(64, 40), (40, 64)]}
    for name, shapes in sizes.items():
        (tmp_path / name).mkdir()
        for number, size in enumerate(shapes):
            photo(number, *size).save(tmp_path / name / f"{number}.png")
    (tmp_path / "photos.csv").write_text("subject,class,images\nrex,dog,rex\ntom,dog,tom\n")
    words = ("data.buckets=true", "train.batch=2", "train.steps=4", "sample.images=0", "track.every_steps=1")
    for out, names in (("both", ["rex", "tom"]), ("alone", ["tom"])):
        _, failed = train_manifest(tmp_path / "photos.csv", small_config(*words), tmp_path / out, names, quiet=True)
        assert not failed
    both, alone = (file_digest(tmp_path / out / "subjects/tom" / LORA) for out in ("both", "alone"))
    assert both == alone
    kept = [len(list((tmp_path / out / "priors").glob("*/latents/*.json"))) for out in ("both", "alone")]
    assert kept == [3, 2]
    square = small_config(*words, "data.buckets=false")
    train_manifest(tmp_path / "photos.csv", square, tmp_path / "square", ["tom"], quiet=True)
    assert file_digest(tmp_path / "square/subjects/tom" / LORA) != alone
