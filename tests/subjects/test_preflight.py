import json
import os
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dbtrain.models.load import load_tokenizer
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.finding import defects
from dbtrain.subjects.identifiers import candidates
from dbtrain.subjects.manifest import read_manifest
from dbtrain.subjects.preflight import preflight, sift
from dbtrain.subjects.registry import recorded_identifiers
from dbtrain.values import Subject
from tests.kit.made_photos import picture, png

CONFIG = RunConfig.model_validate({"data": {"resolution": 32}})


def small(settings):
    """Settings at the resolution of the photos here."""
    return RunConfig.model_validate({**settings, "data": {**settings.get("data", {}), "resolution": 32}})


def test_sound_subjects_have_no_findings_even_with_one_photo(photo_folder):
    path = photo_folder / "m.csv"
    path.write_text("subject,class,images\ncat,cat,cat\ntiger,big cat,tiger\n")
    before = {file: file.stat().st_mtime_ns for file in photo_folder.rglob("*")}
    assert preflight(read_manifest(path), CONFIG) == []
    assert {file: file.stat().st_mtime_ns for file in photo_folder.rglob("*")} == before


def test_every_bad_photo_is_found_in_order_with_subject_file_and_remedy(photo_folder):
    good = photo_folder / "cat" / "p1.png"
    bad = [photo_folder / f"b{number}.png" for number in range(3)]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(b"BM" * 100)
    subjects = [Subject("a", "cat", (good, bad[0], good, bad[1])), Subject("b", "cat", (bad[2], good))]
    found = defects(preflight(subjects, CONFIG))
    assert [(finding.subject, finding.file) for finding in found] == [
        ("a", str(bad[0])),
        ("a", str(bad[1])),
        ("b", str(bad[2])),
    ]
    assert [finding.what[:10] for finding in found] == ["is empty (", "is no JPEG", "cannot be "]
    assert all(finding.remedy and finding.line().isprintable() for finding in found)


@pytest.mark.parametrize("name", [b"\xe9.png", b"\x1b[31m.png"])
def test_a_photos_name_cannot_upset_the_table_of_findings(tmp_path, name):
    photo = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    photo.write_bytes(b"BM")
    (finding,) = preflight([Subject("a", "cat", (photo,))], CONFIG)
    assert finding.line().isprintable() and "is no JPEG" in finding.what
    json.dumps(asdict(finding), ensure_ascii=False).encode()


PACKED = {"engine": {"kind": "packed"}, "prior": {"weight": 0}}
FULL = {"train": {"method": "full"}}
NO_IMAGES = {"prior": {"weight": 0, "images": 0}}
WARM = {"train": {"steps": 800, "warmup_steps": 100}}
LONG_CLASS = {"data": {"caption": "{identifier}"}}
FIELDS = [
    ("steps", WARM, {"steps": 100}, "is 100, but train.warmup_steps is 100"),
    ("rank", FULL, {"rank": 4}, "no effect"),
    ("prior_weight", PACKED, {"prior_weight": 0.5}, "the subjects of a pack have priors all or none"),
    ("prior_weight", NO_IMAGES, {"prior_weight": 0.5}, "prior.images is 0"),
    ("caption", {}, {"caption": "{identifier} " + "very " * 80}, "tokens, 30 are read"),
    ("class", LONG_CLASS, {"class_noun": "very " * 30}, "makes a caption of"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.mark.parametrize(("place", "settings", "fields", "what"), FIELDS)
def test_every_field_is_judged_under_the_runs_settings(photo_folder, tokenizer, place, settings, fields, what):
    photos = (photo_folder / "cat" / "p1.png",)
    sound = Subject("rex", "cat", photos, steps=101, identifier="sks")
    bad = Subject(**{"id": "a", "class_noun": "cat", "images": photos, **fields})
    (found,) = preflight([sound, bad], small(settings), tokenizer)
    assert (found.subject, found.file) == ("a", place)
    assert what in found.what and found.remedy
    asked = {name: value for name, value in fields.items() if name in ("rank", "steps", "prior_weight")}
    assert preflight([Subject("a", "cat", photos, **asked)], CONFIG, tokenizer) == []


@pytest.mark.parametrize(
    ("identifier", "part"),
    [
        ("dog", "'dog' has a meaning: 'dog' is a word"),
        ("Dog", "is a word"),
        ("elephant", "is one token of more than 3 characters"),
        ("alex_v2", "splits into common letters"),
        ("<s1>", "splits into common letters"),
        ("[V]", "splits into common letters"),
    ],
)
def test_an_identifier_that_a_user_chose_is_a_note_at_most(photo_folder, tokenizer, identifier, part):
    subject = Subject("a", "cat", (photo_folder / "cat" / "p1.png",), identifier=identifier)
    subjects, (note,) = sift([subject], [], CONFIG, tokenizer)
    assert subjects == [subject] and note.note and note.file == "identifier" and part in note.what


def test_two_spellings_of_one_token_are_said(photo_folder, tokenizer):
    photos = (photo_folder / "cat" / "p1.png",)
    good = candidates(tokenizer)[0].text
    members = [Subject("a", "cat", photos, identifier=good), Subject("b", "cat", photos, identifier=good.upper()),
               Subject("c", "cat", photos, identifier=good)]  # fmt: skip
    (note,) = preflight(members, CONFIG, tokenizer)
    assert (note.subject, note.note) == ("b", True) and f"the same tokens as {good!r}" in note.what


def test_identifiers_that_others_were_given_are_found(tmp_path, tokenizer):
    registry = tmp_path / "identifiers.jsonl"
    given = recorded_identifiers(registry, tokenizer, [Subject("rex", "cat", ())])["rex"]
    asking = [Subject("tom", "cat", (), identifier=given)]
    assert preflight(asking, CONFIG, tokenizer) == []
    configured = small({"identifier": {"registry": str(registry)}})
    for found in (preflight(asking, CONFIG, tokenizer, registry), preflight(asking, configured, tokenizer)):
        assert [one.subject for one in found] == ["tom"]
        assert f"identifier {given!r} was given to subject rex" in found[0].what
    assert preflight([Subject("rex", "cat", (), identifier=given)], CONFIG, tokenizer, registry) == []


def test_photos_far_below_the_resolution_are_one_note_a_subject(photo_folder):
    cat = Subject("cat", "cat", tuple(sorted((photo_folder / "cat").iterdir())))
    large = photo_folder / "large.png"
    large.write_bytes(png(picture(100, 80)))
    (note,) = preflight([cat, Subject("b", "cat", (large,))], RunConfig.model_validate({"data": {"resolution": 80}}))
    assert note.note and note.subject == "cat" and "short side of 40 px (and 2 more are too small)" in note.what
    subjects, findings = sift([cat], [], RunConfig())
    assert subjects == [cat] and len(findings) == 1


@pytest.fixture
def sharp(tmp_path):
    """A sharp photo of grainy blocks, and a function that writes what is made of it."""
    random = np.random.default_rng(1)
    blocks = random.integers(30, 220, (8, 12, 3), dtype=np.uint8).repeat(40, 0).repeat(40, 1)
    photo = Image.fromarray(blocks + random.integers(0, 30, blocks.shape, dtype=np.uint8))

    def write(name, image=photo):
        (tmp_path / name).write_bytes(png(image))
        return tmp_path / name

    return photo, write


AT_256 = RunConfig.model_validate({"data": {"resolution": 256}})


def test_a_blurred_photo_is_a_note_about_the_worst_of_its_subject(sharp):
    photo, write = sharp
    soft, softer = (photo.filter(ImageFilter.GaussianBlur(radius)) for radius in (3, 6))
    turned = soft.transpose(Image.Transpose.ROTATE_180)
    images = (write("a.png"), write("b.png", turned), write("c.png", softer.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    (note,) = preflight([Subject("rex", "dog", images)], AT_256)
    assert note.note and note.file == str(images[2]) and note.what == "looks blurred (and 1 more)"
    assert preflight([Subject("rex", "dog", images)], CONFIG) == [], "at 32 px such photos are sharp"


def test_photos_that_show_the_same_are_a_note_about_their_pair(sharp):
    photo, write = sharp
    other = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    images = (write("a.png"), write("b.png", other), write("c.png", photo.resize((400, 267))))
    (note,) = preflight([Subject("rex", "dog", images)], CONFIG)
    assert note.note and note.file == str(images[0]) and note.what == f"looks the same as {images[2]}"
    apart = [Subject("rex", "dog", images[:2]), Subject("tom", "dog", images[2:])]
    assert preflight(apart, CONFIG) == [], "of two subjects it may be meant"
    (note,) = preflight([Subject("rex", "dog", (*images, write("d.png")))], CONFIG)
    assert note.what.endswith("(and 2 more pairs do)")


def test_with_buckets_a_photo_is_small_where_its_shape_enlarges_it(tmp_path):
    """In the shape of 1:2 the short side is 176 px: 150 are enough for that, and not for a square of 256."""
    (tmp_path / "a.png").write_bytes(png(picture(150, 300)))
    subject = Subject("a", "cat", (tmp_path / "a.png",))
    notes = {
        buckets: [one.what for one in preflight([subject], AT_256.replaced("data.buckets", buckets))]
        for buckets in (False, True)
    }
    assert notes == {False: ["short side of 150 px"], True: []}


def test_captions_of_photos_that_are_too_long_are_a_note(photo_folder, tokenizer):
    photos = tuple(sorted((photo_folder / "cat").iterdir()))
    cat = Subject("cat", "cat", photos, captions=("", "{subject}", "{subject} " + "very " * 80))
    (note,) = preflight([cat], CONFIG, tokenizer)
    assert note.note and note.file == "captions" and "30 are read" in note.what and "has 162 tokens" in note.what


def test_the_cap_is_a_setting_and_a_profile_that_is_none_is_a_note(tmp_path):
    (tmp_path / "a.png").write_bytes(png(picture(1100, 1000), icc_profile=b"none" * 50))
    subject = Subject("a", "cat", (tmp_path / "a.png",))
    (note,) = preflight([subject], CONFIG)
    assert note.note and "colour profile cannot be used" in note.what
    (found,) = preflight([subject], RunConfig.model_validate({"data": {"max_pixels": 1_000_000, "resolution": 32}}))
    assert not found.note and "the cap is 1 million" in found.what and "data.max_pixels" in found.remedy


def test_memory_stays_flat(tmp_path: Path):
    photo = tmp_path / "p.png"
    photo.write_bytes(png(picture(1000, 1000)))

    def peak(count):
        tracemalloc.start()
        preflight([Subject(f"s{n}", "cat", (photo,)) for n in range(count)], CONFIG)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(2)
    assert peak(60) < peak(15) + 2**20
