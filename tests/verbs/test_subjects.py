"""The verbs of the main job, one after another as a user types them, in one process."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.results import finished, uploading
from dbtrain.results.finished import generate_finished
from dbtrain.results.record import finished_record
from dbtrain.subjects.prompts import application
from dbtrain.training import claims, telemetry
from tests.kit.main_job import sd_folder, small_config, write_job

LORA = "pytorch_lora_weights.safetensors"


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(folder, words of the train command): two subjects trained by `dbtrain train --subjects all`."""
    folder = tmp_path_factory.mktemp("cli")
    words = write_job(folder, "train.steps=2")
    result = run("train", *words, "--subjects", "all", "--out", folder / "out", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    assert [record["subject"] for record in json.loads(result.stdout[result.stdout.index("[\n") :])] == ["rex", "tom"]
    return folder, words


@pytest.mark.parametrize("words", [(), ("--subject", "rex", "--subjects", "all"), ("--subjects", "rex")])
def test_which_subjects_must_be_said_once(job, tmp_path, words):
    result = run("train", *job[1], *words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "give --subject ID (it repeats), or --subjects all" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_report_is_told_the_last_command_that_was_let_in(job, tmp_path):
    out = tmp_path / "out"
    words = ("train", *job[1], "--subject", "tom", "--out", out, "--quiet")
    assert run(*words, "prior.weight=0", "track.wandb=nothing/here/is/wrong", "lora.rank=0").exit_code == 2
    assert run("train", tmp_path / "none.csv", *words[2:]).exit_code == 3 and not (out / "run.json").exists()
    done = run(*words, "prior.weight=0", "--skip-bad")
    assert done.exit_code == 0, done.output
    told = json.loads((out / "run.json").read_text())
    assert (told["manifest"], told["skip_bad"], told["verb"]) == (str(job[1][0]), True, "train")
    assert told["overrides"] == [*job[1][3:], "prior.weight=0"]
    for refused in (("train", tmp_path / "none.csv", *words[2:]), (*words, "prior.weight=0", "train.lr=0.5")):
        assert run(*refused).exit_code == 3
        assert json.loads((out / "run.json").read_text()) == told
    assert run(*words, "prior.weight=0", "--subject", "rex").exit_code == 0
    assert json.loads((out / "run.json").read_text()) == {**told, "skip_bad": False}


@pytest.mark.parametrize("setting", ["sample.prompts=[]", "sample.images=0"])
def test_training_without_samples_ends_well_and_its_card_names_none(job, tmp_path, setting):
    words = ("--subject", "tom", "--out", tmp_path / "out", "--quiet", "prior.weight=0", "sample.every_steps=1")
    done = run("train", *job[1], *words, setting)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" / "subjects" / "tom"
    assert not list(folder.glob("**/*.png")) and "samples.png" not in (folder / "README.md").read_text()
    drawn = run("generate", folder)
    assert drawn.exit_code == 2 and "error: " in drawn.stderr
    assert run("generate", folder, "--prompt", "a {subject}", "sample.images=1").exit_code == 0
    assert json.loads((folder / "record.json").read_text())["files"].keys() == {LORA}


def test_an_unknown_subject_is_3_with_a_hint(job, tmp_path):
    result = run("train", *job[1], "--subject", "rax", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "no subject 'rax'; did you mean 'rex'?" in result.stderr


def test_a_bad_setting_is_2_before_anything_is_loaded(job, tmp_path):
    result = run("train", *job[1], "--subject", "rex", "--out", tmp_path / "out", "train.step=3", "lora.rank=0")
    assert result.exit_code == 2
    assert "did you mean train.steps" in result.stderr and "lora.rank" in result.stderr


def test_a_missing_model_is_2_and_a_missing_manifest_3(job, tmp_path):
    words = ["--config", job[1][2], "--subject", "rex", "--out", tmp_path / "out"]
    missing = run("train", job[1][0], *words, f"model.path={tmp_path / 'none'}")
    assert (missing.exit_code, "model.path" in missing.stderr) == (2, True), missing.output
    missing = run("train", tmp_path / "none.csv", *words, f"model.path={sd_folder()}")
    assert (missing.exit_code, "none.csv" in missing.stderr) == (3, True), missing.output


def test_a_base_without_its_tokenizer_is_2(job, tmp_path):
    """transformers makes an empty one of nothing, and every caption would be the same."""
    shutil.copytree(sd_folder(), tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer"))
    words = ["--config", job[1][2], "--subject", "rex", "--out", tmp_path / "out", f"model.path={tmp_path / 'base'}"]
    bare = run("train", job[1][0], *words)
    assert (bare.exit_code, "its tokenizer has no vocabulary" in bare.stderr) == (2, True), bare.output


def test_a_failed_subject_is_4_and_the_others_are_printed(job, tmp_path, monkeypatch):
    from dbtrain import train

    finish = train.train_subject

    def fail_one(base, work, watch, subject):
        if subject.id == "rex":
            return train.EngineError("step 1: the loss is nan")
        return finish(base, work, watch, subject)

    monkeypatch.setattr(train, "train_subject", fail_one)
    result = run("train", *job[1], "--subjects", "all", "--out", job[0] / "out", "--quiet")
    assert result.exit_code == 4
    assert "error: rex: step 1: the loss is nan" in result.stderr
    assert "tom: `" in result.stdout and "rex: `" not in result.stdout


def test_preflight_counts_who_is_left_out_and_looks_without_a_base(job, tmp_path):
    folder = tmp_path / "job"
    words = write_job(folder, subjects="rex:dog tom:cat ann:dog")
    sound = run("preflight", *words)
    assert (sound.exit_code, sound.stdout, sound.stderr) == (
        0, f"{words[0]}: 3 subjects, nothing to complain about\n", "")  # fmt: skip
    for number in range(2):
        (folder / "tom" / f"{number}.jpg").write_bytes(b"no photo")
    assert run("preflight", *words).exit_code == 3
    left = run("preflight", *words, "--skip-bad")
    assert (left.exit_code, left.stdout) == (0, f"{words[0]}: 2 subjects, 1 left out\n")
    assert left.stderr.count("left out: ") == left.stderr.count("subject tom: ") == 2
    blind = run("preflight", *words, "--skip-bad", "model.path=nowhere/base")
    assert (blind.exit_code, blind.stdout) == (0, left.stdout)
    assert blind.stderr.startswith("captions and identifiers are not checked: nowhere/base: no tokenizer found")


def test_two_adapters_share_one_warm_base_and_leave_it_as_it_was(job, monkeypatch):
    folders = [job[0] / "out" / "subjects" / name for name in ("rex", "tom")]
    loads, load_models = [], finished.load_models

    def count(*words):
        loads.append(load_models(*words))
        return loads[-1]

    monkeypatch.setattr(finished, "load_models", count)
    result = run("generate", *folders, "--prompt", "a photo of {subject}", "--name", "two", "sample.seed=7")
    assert result.exit_code == 0, result.output
    assert len(loads) == 1
    base = load_models(finished.FAMILIES["sd"], small_config().model)
    assert all(torch.equal(a, b) for a, b in zip(loads[0].denoiser.parameters(), base.denoiser.parameters()))
    alone = next(iter(generate_finished(folders[1:], ["a photo of {subject}"], ["sample.seed=7"], "alone")))
    images = [Image.open(path).tobytes() for path in (folders[1] / "two.png", alone, folders[0] / "two.png")]
    assert images[0] == images[1] != images[2]


def test_published_samples_can_be_drawn_again(job):
    """The sheet made at the end of training and the one of the published adapter: the same pixels."""
    folder = job[0] / "out" / "subjects" / "rex"
    sheet = next(iter(generate_finished([folder], None, (), "again")))
    assert Image.open(sheet).tobytes() == Image.open(folder / "samples.png").tobytes()


def test_generate_refuses_what_is_not_finished(job, tmp_path):
    (tmp_path / "x").mkdir()
    result = run("generate", tmp_path / "x")
    assert result.exit_code == 3
    assert "give a folder under OUT/subjects/" in result.stderr


def test_export_writes_kohyas_names_and_never_the_published_file(job, tmp_path):
    folder = job[0] / "out" / "subjects" / "rex"
    before = (folder / LORA).read_bytes()
    for source in (folder, folder / LORA):
        assert run("export", source, "--out", tmp_path / "rex.safetensors").exit_code == 0
        names = load_file(tmp_path / "rex.safetensors")
        assert all(name.startswith("lora_unet_") for name in names)
        assert len(names) == 3 * len(load_file(folder / LORA)) // 2
    assert (folder / LORA).read_bytes() == before
    (tmp_path / "no.safetensors").write_bytes(b"no adapter")
    assert run("export", tmp_path / "no.safetensors", "--out", tmp_path / "y").exit_code == 3


def flip(path):
    """One bit of the last byte, which is a weight's."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_a_damaged_adapter_is_used_by_nobody_and_mended_by_the_same_command(job, tmp_path, harm):
    out, sound = tmp_path / "out", (job[0] / "out" / "subjects" / "rex" / LORA).read_bytes()
    shutil.copytree(job[0] / "out", out)
    folder = out / "subjects" / "rex"
    harm(folder / LORA)
    uses = [("generate", folder), ("evaluate", folder)]
    uses += [("export", source, "--out", tmp_path / "x") for source in (folder, folder / LORA)]
    for words in uses:
        refused = run(*words)
        assert refused.exit_code == 3 and f"{LORA}: " in refused.stderr, (words, refused.output)
        assert "run the same training again, which mends it" in refused.stderr
    again = run("train", *job[1], "--subjects", "all", "--out", out)
    assert again.exit_code == 0 and f"rex: is not finished after all, and trained on: {folder / LORA}" in again.stderr
    assert f"tom: already finished in {out}" in again.stderr
    assert (folder / LORA).read_bytes() == sound
    assert run("export", folder, "--out", tmp_path / "x").exit_code == 0
    assert "already finished" in run("train", *job[1], "--subject", "rex", "--out", out).stderr


def test_a_finished_subject_of_large_files_is_known_by_their_sizes(job, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "QUICK_BYTES", 0)
    out = tmp_path / "out"
    shutil.copytree(job[0] / "out", out)
    words = ("train", *job[1], "--subject", "rex", "--out", out)
    flip(out / "subjects" / "rex" / LORA)
    assert "already finished" in run(*words).stderr
    os.truncate(out / "subjects" / "rex" / LORA, 100)
    assert "has 100 bytes" in run(*words).stderr


def test_a_prompt_set_is_a_captioned_sheet(job):
    folders = [job[0] / "out" / "subjects" / name for name in ("rex", "tom")]
    words = ("sample.steps=1", "sample.images=1")
    result = run("generate", *folders, "--set", "views", "--set", "properties", *words)
    assert result.exit_code == 0, result.output
    wanted = [folder / f"{name}.png" for folder in folders for name in ("views", "properties")]
    assert result.stdout.split() == [str(path) for path in wanted] and all(path.exists() for path in wanted)
    assert len(list((folders[0] / "samples" / "views").glob("*.png"))) == len(application("views", "dog"))
    assert len(list((folders[1] / "samples" / "properties").glob("*.png"))) == len(application("properties", "cat"))


@pytest.mark.parametrize("words, message", [
    (("sample.seed=7",), "FOLDER: is missing"),
    (("FOLDER", "--set", "view"), "'view': is not there; sets are accessories, art"),
    (("FOLDER", "--set", "views", "--prompt", "x"), "--prompt, --set: give one of them"),
    (("FOLDER", "--set", "art", "--set", "./art.yaml"), "art and ./art.yaml would both be the sheet art.png"),
    (("FOLDER", "--name", "samples"), "'samples' is the name of a sheet of the training"),
    (("FOLDER", "--name", "step-000100"), "'step-000100' is the name of a sheet of the training"),
    (("FOLDER", "--set", "some/samples.yaml"), "'samples' is the name of a sheet of the training"),
    (("FOLDER", "--name", "../../other"), "'../../other' is no name of a sheet"),
    (("FOLDER", "sample.images=0"), "sample.images is 0 there, and nothing would be drawn; add sample.images=4"),
    (("FOLDER", "sample.prompts=[]"), "generated has no prompt for this subject; give --prompt"),
    (("FOLDER", "sample.sed=7"), "did you mean sample.seed")])
def test_generate_explains_wrong_words(job, words, message):
    folder = job[0] / "out" / "subjects" / "rex"
    result = run("generate", *(folder if word == "FOLDER" else word for word in words))
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_a_negative_prompt_and_a_weight_change_pictures(job):
    folder = job[0] / "out" / "subjects" / "rex"

    def drawn(name, *words):
        settings = ("sample.images=1", "sample.steps=3", "sample.guidance=30")
        done = run("generate", folder, "--prompt", "a {subject}", "--name", name, *settings, *words)
        assert done.exit_code == 0, done.output
        return Image.open(folder / f"{name}.png").tobytes()

    plain = drawn("w1")
    assert drawn("w2", "--weight", "1.0") == plain
    assert drawn("w3", "--negative", "{subject}, blurry") != plain
    assert drawn("w4", "--weight", "0") != plain
    assert run("generate", folder, "--prompt", "a {subject}", "--weight", "9").exit_code == 2


def test_weight_zero_is_the_base(job):
    folder = job[0] / "out" / "subjects" / "rex"
    config = finished.finished_config(folder, ["sample.images=1"])
    models, family = finished.load_models(finished.FAMILIES["sd"], config.model), finished.FAMILIES["sd"]
    rows = []
    for place, weight in ((None, 1.0), (folder, 0.0)):
        with finished.finished_pipeline(place, family, models, config, weight) as pipeline:
            rows.append(finished.draw_samples(pipeline, ["a dog"], config.sample, config.data.resolution)[0][0])
    assert rows[0].tobytes() == rows[1].tobytes()


def test_a_whole_model_has_no_weight(job, model_folders, tmp_path):
    config = finished.finished_config(job[0] / "out" / "subjects" / "rex", [])
    models, family = finished.load_models(finished.FAMILIES["sd"], config.model), finished.FAMILIES["sd"]
    pipeline = finished.finished_pipeline(tmp_path, family, models, config, 0.5)
    with pytest.raises(finished.ConfigError, match="has no adapter to weigh"), pipeline:
        pass


def test_finished_subjects_are_published_and_what_fails_is_finished_by_the_same_command(job, tmp_path, monkeypatch):
    monkeypatch.setattr(uploading, "PAUSES_S", ())
    out, far = tmp_path / "out", tmp_path / "far"
    shutil.copytree(job[0] / "out", out)
    words = ("train", *job[1], "--subjects", "all", "--out", out, "--publish-to", far)
    far.mkdir()
    (far / "tom").write_text("in the way")
    failed = run(*words)
    assert failed.exit_code == 3 and f"error: tom: is finished here, and not yet at {far}: " in failed.stderr
    assert "rex: uploaded to" in failed.stderr and f"in {out / 'subjects' / 'tom'}" in failed.stdout
    (far / "tom").unlink()
    again = run(*words)
    assert again.exit_code == 0 and "tom: uploaded to" in again.stderr and "rex: uploaded to" not in again.stderr
    for name in ("rex", "tom"):
        assert finished_record(far / name) == finished_record(out / "subjects" / name)
        assert str(far) not in (far / name / "README.md").read_text() + (far / name / "config.yaml").read_text()
    assert run("export", far / "rex", "--out", tmp_path / "rex.safetensors").exit_code == 0


@pytest.mark.parametrize("verb", [("train", "--subjects", "all"), ("batch", "run")])
@pytest.mark.parametrize("address", ["https://host/x", "s3://key:secret@bucket", "s3:/bucket"])
def test_an_address_that_cannot_be_used_ends_before_any_work(job, tmp_path, verb, address):
    refused = run(*verb, *job[1], "--out", tmp_path / "out", "--publish-to", address)
    assert refused.exit_code == 2 and refused.stderr.startswith("error: publish.to: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [("train", "--subjects", "all"), ("batch", "run"), ("preflight",)])
def test_a_missing_tracker_ends_before_any_work(job, tmp_path, verb, monkeypatch):
    monkeypatch.setattr(telemetry, "find_spec", lambda name: None)
    out = () if verb == ("preflight",) else ("--out", tmp_path / "out")
    refused = run(*verb, *job[1], "track.trackio=x", *out)
    assert refused.exit_code == 2 and "error: track.trackio: trackio is not installed" in refused.stderr
    assert not (tmp_path / "out").exists()
