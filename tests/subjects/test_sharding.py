"""Photos of subjects as shards: written once, checked again; subjects with findings stop it or are left out."""

import hashlib
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.data import images
from dbtrain.data.index import Index
from dbtrain.data.stream import SKIPPED, read_samples, verify
from dbtrain.errors import DataError
from dbtrain.models.load import load_tokenizer
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.subjects.manifest import read_manifest, scan_manifest
from dbtrain.subjects.preflight import sift
from dbtrain.subjects.sharding import photo_samples, shard_subjects
from dbtrain.values import Subject
from tests.kit.made_photos import picture, png

CONFIG = RunConfig.model_validate({"data": {"resolution": 32}})
ROWS = [
    "subject,class,images,caption",
    "good,cat,good,",
    "torn,cat,torn,",
    "bad id!,cat,good,",
    "twice,cat,good,",
    "TWICE,cat,good,",
    f"wordy,cat,good,a photo of {{identifier}} {'very ' * 90}cat",
    "fine,dog,fine,",
]


@pytest.fixture
def manifest(tmp_path):
    for name in ("good", "torn", "fine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(picture(seed=len(name))))
    (tmp_path / "torn" / "2.png").write_bytes(png(picture())[:-40])
    (tmp_path / "m.csv").write_text("\n".join(ROWS))
    return tmp_path / "m.csv"


def test_sound_subjects_go_on_and_every_other_has_its_reasons(manifest):
    subjects, findings = sift(*scan_manifest(manifest), CONFIG, load_tokenizer("embedded"))
    assert [subject.id for subject in subjects] == ["good", "fine"]
    lines = "\n".join(finding.line() for finding in findings)
    for reason in ("bad id!", "differs only by case", "torn", "tokens, 30 are read", "cut short"):
        assert reason in lines


def test_shards_hold_the_sound_ones_and_say_who_is_missing(manifest, tmp_path):
    said: list[str] = []
    tokenizer = load_tokenizer("embedded")
    with pytest.raises(DataError, match="cut short"):
        shard_subjects(*scan_manifest(manifest), tmp_path / "s", CONFIG, said.append)
    assert not (tmp_path / "s").exists()
    shard_subjects(*scan_manifest(manifest), tmp_path / "s", CONFIG, said.append, True, tokenizer)
    assert Index.load(tmp_path / "s").subjects == ("good", "fine")
    skipped = json.loads((tmp_path / "s" / SKIPPED).read_text())
    assert set(skipped) == {"torn", "twice", "TWICE", "wordy", "m.csv:4"} and all(skipped.values())
    assert "differs only by case from 'TWICE' of row 6" in skipped["twice"][0]
    assert "column subject: got 'bad id!'" in skipped["m.csv:4"][0]
    assert sum(line.startswith("left out: ") for line in said) == sum(map(len, skipped.values()))
    assert verify(tmp_path / "s") == []
    (tmp_path / "s" / SKIPPED).unlink()
    shard_subjects(*scan_manifest(manifest), tmp_path / "s", CONFIG, said.append, True, tokenizer)
    assert "nothing to do" in said[-1]
    assert json.loads((tmp_path / "s" / SKIPPED).read_text()) == skipped


def test_settings_are_judged_though_the_shards_are_there(manifest, tmp_path):
    """They may have been made under others; photos that are in them are not decoded again."""
    manifest.write_text("subject,class,images,prior_weight\ngood,cat,good,0.5\nfine,dog,fine,\n")
    shard_subjects(*scan_manifest(manifest), tmp_path / "s", CONFIG, str)
    packed = {"data": {"resolution": 32}, "engine": {"kind": "packed"}, "prior": {"weight": 0}}
    with pytest.raises(DataError, match="subject good: is 0.5 while prior.weight is 0"):
        shard_subjects(*scan_manifest(manifest), tmp_path / "s", RunConfig.model_validate(packed), str)


def test_nothing_sound_is_an_error(manifest, tmp_path):
    manifest.write_text("\n".join([ROWS[0], ROWS[2]]))
    with pytest.raises(DataError, match="cut short"):
        shard_subjects(*scan_manifest(manifest), tmp_path / "s", CONFIG, str, True)


def test_the_verb_lists_everything_and_writes_nothing(manifest):
    def run(*words):
        asked = ["preflight", str(manifest), "--config", "tiny", "data.resolution=32", *words]
        return CliRunner().invoke(cli.app, asked)

    before = {path: path.stat().st_mtime_ns for path in manifest.parent.rglob("*")}
    refused, skipping, as_json = run(), run("--skip-bad"), run("--skip-bad", "--json")
    assert (refused.exit_code, skipping.exit_code, as_json.exit_code) == (3, 0, 0)
    findings = json.loads(as_json.stdout)
    assert len(findings) == refused.stderr.count("error: ") == skipping.stderr.count("left out: ") == 5
    assert "2 subjects" in skipping.stdout
    assert {path: path.stat().st_mtime_ns for path in manifest.parent.rglob("*")} == before


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def two_cats(photo_folder):
    path = photo_folder / "m.csv"
    path.write_text("subject,class,images\ncat,cat,cat\ntiger,big cat,tiger\n")
    return path


def test_photo_samples_carry_pixels_and_provenance(two_cats):
    cat, tiger = read_manifest(two_cats)
    samples = list(photo_samples([cat], CONFIG.data))
    assert [sample.key for sample in samples] == ["cat-0-0", "cat-0-1", "cat-0-2"]
    assert [sample.meta["source"] for sample in samples] == ["p1.png", "p2.PNG", "p10.png"]
    for sample, path in zip(samples, cat.images, strict=True):
        assert sample.meta["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (sample.meta["width"], sample.meta["height"], sample.meta["class"]) == (48, 40, "cat")
        stored, photo = images.open_photo(sample.image), images.open_photo(path)
        assert min(stored.size) == 32
        np.testing.assert_array_equal(images.square(stored, 32), images.square(photo, 32))
    (only,) = photo_samples([tiger], DataConfig(resolution=4096))
    assert images.open_photo(only.image).size == (48, 40)


def test_sharding_again_changes_nothing_and_says_so(two_cats, tmp_path):
    out, said = tmp_path / "out", []
    index = shard_subjects(*scan_manifest(two_cats), out, CONFIG, said.append)
    assert [sample.subject for sample in read_samples(out, index.entries)] == ["cat"] * 3 + ["tiger"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert shard_subjects(*scan_manifest(two_cats), out, CONFIG, said.append) == index
    assert "nothing to do" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_damage_is_remade(two_cats, tmp_path):
    out, said = tmp_path / "out", []
    shard_subjects(*scan_manifest(two_cats), out, CONFIG, said.append)
    sound = digests(out)
    (out / "train-000000.tar").write_bytes(b"damaged")
    shard_subjects(*scan_manifest(two_cats), out, CONFIG, said.append)
    assert any("remaking" in line for line in said)
    assert digests(out) == sound


def test_other_input_is_refused(two_cats, tmp_path):
    out = tmp_path / "out"
    shard_subjects(*scan_manifest(two_cats), out, CONFIG, str)
    sound = digests(out)
    with pytest.raises(DataError, match="other photos, captions or another resolution"):
        shard_subjects(*scan_manifest(two_cats), out, RunConfig(data=DataConfig(resolution=40)), str)
    photo = next((two_cats.parent / "cat").iterdir())
    photo.write_bytes((two_cats.parent / "tiger" / "a.jpg").read_bytes())
    with pytest.raises(DataError, match="cat: 1 of its stored photos are gone or changed"):
        shard_subjects(*scan_manifest(two_cats), out, CONFIG, str)
    assert digests(out) == sound


def test_bad_photos_are_all_named_before_anything_is_written(two_cats, tmp_path):
    (two_cats.parent / "cat" / "p1.png").write_bytes(b"")
    (two_cats.parent / "tiger" / "a.jpg").write_bytes(b"BM")
    with pytest.raises(DataError) as caught:
        shard_subjects(*scan_manifest(two_cats), tmp_path / "out", CONFIG, str)
    first, second = str(caught.value).splitlines()
    assert "p1.png: subject cat: is empty" in first
    assert "a.jpg: subject tiger: is no JPEG" in second
    assert not (tmp_path / "out").exists()


def test_a_photo_lost_meanwhile_is_named(two_cats):
    subject = Subject("cat", "cat", (two_cats.parent / "none.png",))
    with pytest.raises(DataError, match="none.png: cannot be read"):
        list(photo_samples([subject], CONFIG.data))
