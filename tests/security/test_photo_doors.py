"""Hostile input at the doors that photos bring along: masks, captions, tables, imports, tars, HEIC.

Each case goes the whole way of a user's folder: manifest, preflight, shards. It must end in a finding or in our own
error, name the file, and store nothing. What only looks hostile and is text stays text.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbtrain.data.formats import readable
from dbtrain.data.images import open_photo
from dbtrain.errors import DataError, DbtrainError
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.subjects.finding import defects
from dbtrain.subjects.foreign import from_imagefolder, from_kohya
from dbtrain.subjects.manifest import scan_manifest
from dbtrain.subjects.preflight import sift
from dbtrain.subjects.sharding import shard_subjects
from dbtrain.subjects.tars import tar_samples
from tests.kit.made_photos import mask_of, picture, png
from tests.security.test_corpus import CANARY, PHOTOS, PICKLES

CONFIG = RunConfig.model_validate({"data": {"resolution": 32}})
PHOTO = png(picture())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A subject of one sound photo, and a folder in which no payload may have left anything."""
    monkeypatch.chdir(tmp_path)
    Path("rex").mkdir()
    Path("rex/1.png").write_bytes(PHOTO)
    Path("m.jsonl").write_text(json.dumps({"subject": "rex", "class": "dog", "images": "rex"}))
    yield tmp_path
    assert not CANARY.exists() and not Path("shards").exists()


def told(manifest: Path = Path("m.jsonl"), config: RunConfig = CONFIG) -> str:
    """What is said of a manifest that must not pass: its defects, which sharding refuses too."""
    found = sift(*scan_manifest(manifest), config)[1]
    with pytest.raises(DbtrainError) as caught:
        shard_subjects(*scan_manifest(manifest), Path("shards"), config, str)
    lines = [one.line() for one in defects(found)]
    assert lines and all(line.isprintable() for line in lines) and lines[0].split(": ")[0] in str(caught.value)
    return "\n".join(lines)


MASKS = {
    **PHOTOS,
    **{f"pickle {number}": content for number, content in enumerate(PICKLES)},
    "empty": b"",
    "of one line": png(Image.new("L", (4800, 4))),
    "a 16-bit bomb": png(mask_of())[:16] + (60_000).to_bytes(4, "big") * 2 + png(mask_of())[24:],
}


@pytest.mark.parametrize("name", MASKS)
def test_a_hostile_mask_is_a_finding_beside_the_photo_and_in_the_column(name):
    Path("rex/1-mask.png").write_bytes(MASKS[name])
    assert "1-mask.png" in told()
    Path("rex/1-mask.png").rename("mask.png")
    Path("m.jsonl").write_text(json.dumps({"subject": "rex", "class": "dog", "images": "rex", "mask": "mask.png"}))
    assert "mask.png" in told()


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "/proc/self/environ"])
def test_a_link_under_a_masks_name_gives_nothing_away(target):
    Path("rex/1-mask.png").symlink_to(target)
    assert not any(part in told() for part in ("root:x:0:0", "PATH="))


PIPES = ["1-mask.png", "1.txt", "1.caption", "2.png", "2.heic", "metadata.jsonl", "metadata.csv", "metadata.parquet"]


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize("kind", ["pipe", "link to nowhere", "link to a device"])
def test_pipes_and_links_are_not_waited_for_and_never_pass_in_silence(name, kind):
    place = Path("rex", name)
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("nowhere" if "nowhere" in kind else "/dev/zero")
    subjects, findings = scan_manifest(Path("m.jsonl"))
    findings = sift(subjects, findings, CONFIG)[1]
    assert any(name in one.line() for one in defects(findings)), findings


TEXTS = {
    "an attribute": b"a {identifier.__class__}",
    "an index": b"a {0}",
    "a conversion": b"a {identifier!r}",
    "a format": b"a {identifier:>99999999}",
    "a brace": b"a {",
    "UTF-16": "a dog".encode("utf-16"),
    "a NUL": b"a\0dog",
    "an escape": b"a \x1b[31mdog",
    "a line separator inside": "a\u2028dog\u202e".encode() + b"\x07",
    "too long": b"a " * 2400,
    "too large": b"\n" * 70_000,
    # The first pickle is plain text.
    **{f"pickle {number}": content for number, content in enumerate(PICKLES) if number},
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_caption_is_a_finding_in_each_place_it_may_stand(name):
    content = TEXTS[name]
    for side in ("1.txt", "1.caption"):
        Path("rex", side).write_bytes(content)
        assert side in told()
        Path("rex", side).unlink()
    with tarfile.open("a.tar", "w") as file:
        for member, body in (("1.png", PHOTO), ("1.txt", content)):
            entry = tarfile.TarInfo(member)
            entry.size = len(body)
            file.addfile(entry, io.BytesIO(body))
    with pytest.raises(DataError, match=r"a\.tar: '1\.txt'"):
        list(tar_samples([Path("a.tar")], "rex", "dog", DataConfig(resolution=32), str))
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    if len(content) < 5000:
        Path("rex/metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": text}))
        assert "metadata.jsonl" in told()


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "$(touch canary)", "`touch canary`", "%s%n"])
def test_text_that_is_code_elsewhere_is_text_here(text):
    Path("rex/1.txt").write_text(text)
    subjects, findings = sift(*scan_manifest(Path("m.jsonl")), CONFIG)
    assert not defects(findings) and subjects[0].captions == (f"{{subject}}, {text}",)


TABLES = {
    "deep": ("metadata.jsonl", b"[" * 100_000),
    "deep inside": ("metadata.jsonl", b'{"file_name": "1.png", "text": ' + b"[" * 50_000),
    "an endless number": ("metadata.jsonl", b'{"file_name": "1.png", "text": ' + b"9" * 100_000 + b"}"),
    "half a character": ("metadata.jsonl", rb'{"file_name": "1.png", "text": "\ud800"}'),
    "a list": ("metadata.jsonl", b'["1.png", "a dog"]'),
    "a NUL in CSV": ("metadata.csv", b"file_name,text\n1.png,a\0dog\n"),
    "an endless cell": ("metadata.csv", b"file_name,text\n1.png," + b"a" * 3_000_000),
    "a quote that never ends": ("metadata.csv", b'file_name,text\n1.png,"a dog\n'),
    "Parquet that is cut": ("metadata.parquet", b"PAR1" + bytes(100)),
    "Parquet of lies": ("metadata.parquet", b"PAR1" + b"\xff" * 200 + b"\xff\xff\xff\x7fPAR1"),
    "a pickle as Parquet": ("metadata.parquet", PICKLES[1]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_hostile_table_of_captions_is_a_finding(name):
    file, content = TABLES[name]
    Path("rex", file).write_bytes(content)
    assert file in told()


def test_a_table_that_names_files_elsewhere_opens_none_and_says_so():
    rows = [{"file_name": name, "text": "a dog"} for name in ("1.png", "../secret.png", "/etc/passwd", "2.png")]
    Path("rex/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subjects, findings = scan_manifest(Path("m.jsonl"))
    assert subjects[0].captions == ("{subject}, a dog",) and subjects[0].images == (Path("rex/1.png").resolve(),)
    assert any("'2.png'" in one.what and one.note for one in findings), findings


IMPORTS: dict[str, Callable[[Path], object]] = {
    "a loop of links": lambda place: (place / "10_zorbo dog").symlink_to(place),
    "a link out": lambda place: (place / "10_zorbo dog").symlink_to("/etc"),
    "a pipe for a photo": lambda place: ((place / "10_zorbo dog").mkdir(), os.mkfifo(place / "10_zorbo dog" / "1.png")),
    "a pickle": lambda place: ((place / "10_x dog").mkdir(), (place / "10_x dog/1.png").write_bytes(PICKLES[1])),
    "an endless number": lambda place: (place / ("9" * 200 + "_zorbo dog")).mkdir(),
    "a name with a line break": lambda place: (place / "10_zor\nbo dog").mkdir(),
    "a name that leads out": lambda place: (place / "10_.. ..").mkdir(),
}


@pytest.mark.parametrize("name", IMPORTS)
@pytest.mark.parametrize("make", [from_kohya, from_imagefolder])
def test_a_hostile_folder_is_refused_by_the_import_or_by_preflight(name, make):
    place = Path("import")
    place.mkdir()
    IMPORTS[name](place)
    try:
        imported = make(place)
    except DataError as error:
        assert str(error).isprintable()  # noqa: PT017
        return
    imported.write(Path("made.jsonl"))
    assert told(Path("made.jsonl"))


def test_a_class_of_a_folders_name_cannot_leave_its_place():
    (place := Path("import/10_zorbo ..")).mkdir(parents=True)
    (place / "1.png").write_bytes(PHOTO)
    (place := Path("import/5_../x dog")).mkdir(parents=True)
    (place / "1.png").write_bytes(PHOTO)
    try:
        rows = from_kohya(Path("import")).rows
    except DataError:
        return
    assert all(row["subject"].replace("-", "").isalnum() for row in rows)


HEIC = pytest.mark.skipif("HEIC" not in readable(), reason="needs the extra `photos`")


@HEIC
@pytest.mark.parametrize("size", [(65_535, 65_535), (20_000, 20_000), (0, 0), (2**31, 1), (320, 15), (320, 20)])
def test_a_heic_that_claims_another_size_is_refused_before_it_is_decoded(size):
    content = bytearray(heic())
    place = content.find(b"ispe") + 8
    content[place : place + 8] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    Path("rex/2.heic").write_bytes(content)
    assert "2.heic" in told()


@HEIC
def test_a_damaged_heic_is_refused_or_a_picture_and_nothing_else():
    content, random = heic(), np.random.default_rng(0)
    for _ in range(150):
        harmed = bytearray(content)
        harmed[int(random.integers(len(harmed)))] ^= 1 << int(random.integers(8))
        harmed = harmed[: int(random.integers(len(harmed)))] if random.random() < 0.3 else harmed
        try:
            assert open_photo(bytes(harmed)).size
        except DataError as error:
            assert str(error).isprintable() and " object at 0x" not in str(error)  # noqa: PT017


def heic() -> bytes:
    out = io.BytesIO()
    picture(160, 120).save(out, "HEIF", quality=40)
    return out.getvalue()
