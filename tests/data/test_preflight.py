import json
import os
import tracemalloc
from pathlib import Path

import pytest

from dbtrain.batch import Subject
from dbtrain.config import RunConfig, TrainConfig
from dbtrain.data.manifest import read_manifest
from dbtrain.data.preflight import preflight
from tests.data.made import picture, png

CONFIG = RunConfig()


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
    found = preflight(subjects, CONFIG)
    assert [(finding.subject, finding.file) for finding in found] == [
        ("a", str(bad[0])),
        ("a", str(bad[1])),
        ("b", str(bad[2])),
    ]
    assert [finding.what[:10] for finding in found] == ["is empty (", "is no JPEG", "cannot be "]
    assert all(finding.remedy and finding.line().isprintable() for finding in found)
    assert found[0].row() == {"subject": "a", "file": str(bad[0]), "what": found[0].what, "remedy": found[0].remedy}


@pytest.mark.parametrize("name", [b"\xe9.png", b"\x1b[31m.png"])
def test_a_photos_name_cannot_upset_the_table_of_findings(tmp_path, name):
    photo = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    photo.write_bytes(b"BM")
    (finding,) = preflight([Subject("a", "cat", (photo,))], CONFIG)
    assert finding.line().isprintable() and "is no JPEG" in finding.what
    json.dumps(finding.row(), ensure_ascii=False).encode()


WARM = RunConfig(train=TrainConfig(steps=800, warmup_steps=100))
FIELDS = [
    (Subject("../x", "cat", ("p",)), "id"),
    (Subject("REX", "cat", ("p",)), "id"),
    (Subject("rex", "cat", ("p",)), "id"),
    (Subject("a", " ", ("p",)), "class"),
    (Subject("a", "cat", ()), "images"),
    (Subject("a", "cat", ("p",), steps=100), "steps"),
    (Subject("a", "cat", ("p",), caption="{identifier} " + "very " * 80), "caption"),
]


@pytest.mark.parametrize(("subject", "place"), FIELDS)
def test_every_field_is_checked(photo_folder, subject, place):
    photo = photo_folder / "cat" / "p1.png"
    images = tuple(photo for _ in subject.images)
    subject = Subject(**{**vars(subject), "images": images})
    found = preflight([Subject("rex", "cat", (photo,), steps=101), subject], WARM, lambda text: len(text.split()))
    assert [finding.file for finding in found] == [place]
    assert ("differs only by case" in found[0].what) == (subject.id == "REX")


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
