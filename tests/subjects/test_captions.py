"""Captions of single photos: beside them, in an imagefolder's table, in the manifest; and in what shards hold."""

import json
import os
from dataclasses import replace
from functools import partial

import pytest

from dbtrain.data.index import Index
from dbtrain.data.stream import read_samples
from dbtrain.errors import DataError
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.subjects.captions import MAX_BYTES, check_caption
from dbtrain.subjects.finding import CellError
from dbtrain.subjects.manifest import read_manifest, scan_manifest
from dbtrain.subjects.sharding import shard_subjects, source_digest, source_lines
from dbtrain.values import OWN

CONFIG = RunConfig(data=DataConfig(resolution=32))


@pytest.fixture
def cats(photo_folder):
    """A manifest with one row: three photos, p1, p2 and p10."""
    (photo_folder / "m.csv").write_text("subject,class,images\ncat,cat,cat\n")
    return photo_folder / "m.csv"


def captions(manifest, **files):
    for name, content in files.items():
        (manifest.parent / "cat" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (subject,) = read_manifest(manifest)
    return subject.captions


def test_texts_beside_photos_are_their_captions(cats):
    assert captions(cats) is None
    found = captions(cats, **{"p1.txt": "\ufeffa {subject},\r\n on a shelf\n", "p2.caption": "[trigger] asleep"})
    assert found == ("a {subject}, on a shelf", "[trigger] asleep", "")
    assert captions(cats, **{"p10.txt": "  \n", "p10.caption": "unused after .txt"}) == (*found[:2], "")


TABLES = {
    "metadata.jsonl": '{"file_name": "p1.png", "text": "one"}\n{"file_name": "p2.PNG", "text": "two", "width": 3}\n',
    "metadata.csv": "file_name,text\np1.png,one\n./p2.PNG,two\nlost.png,three\n",
    "metadata.csv ": "image;caption\np1.png;one\np2.PNG;two\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_an_imagefolders_table_is_read(cats, name):
    found = captions(cats, **{name.strip(): TABLES[name]})
    assert found == ("{subject}, one", "{subject}, two", "")
    assert captions(cats, **{"p1.txt": "nearer {subject}"})[0] == "nearer {subject}"


def test_where_captions_come_from_and_what_was_added_is_said(cats):
    captions(cats, **{"p1.txt": "a dog", "p2.txt": "SRX on grass"})
    cats.write_text("subject,class,images,identifier\ncat,cat,cat,srx\n")
    (subject,), findings = scan_manifest(cats)
    assert subject.captions == ("{subject}, a dog", "SRX on grass", "")
    assert all(one.note for one in findings)
    assert [one.what for one in findings] == [
        "captions of 2 of 3 photos from: txt",
        "1 of them do not name the subject, such as 'a dog'",
    ]


BAD = {
    "control": ("p1.txt", b"a\x07b", "control character"),
    "latin": ("p1.txt", b"caf\xe9", "not UTF-8"),
    "binary": ("p1.txt", bytes(range(256)), "not UTF-8"),
    "long": ("p1.txt", b"a" * 4001, "got 4001 characters"),
    "huge": ("p1.caption", b"a" * (MAX_BYTES + 1), "larger than"),
    "placeholder": ("p1.txt", b"a {who}", "placeholder '{who}'"),
    "alternatives": ("p1.txt", b"a {red|blue} cat", "placeholder '{red|blue}'"),
    "spaces": ("p1.txt", b"a { subject }", "placeholder '{ subject }'"),
    "doubled": ("p1.txt", b"a {{subject}}", "placeholder '{{subject}}'"),
    "no closing": ("p1.txt", b'{"a": "{subject"}', "paired braces"),
    "in JSON": ("p1.txt", b'{"a": "{sbject}"}', "placeholder '{sbject}'"),
    "a brace": ("p1.txt", b"a } cat", "paired braces"),
    "no json": ("metadata.jsonl", b"file_name", "is no JSON"),
    "no column": ("metadata.jsonl", b'{"file": "p1.png"}', "holds no caption of a photo"),
    "a pickle": ("metadata.csv", b"\x80\x04K\x01.", "not UTF-8"),
    "a parquet": ("metadata.parquet", b"PAR1", "no readable Parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_caption_that_is_none_is_a_finding_with_its_file(cats, name):
    file, content, part = BAD[name]
    (cats.parent / "cat" / file).write_bytes(content)
    subjects, (found,) = scan_manifest(cats)
    assert not subjects and file in found.what and part in found.what and found.line().isprintable()


def test_links_and_pipes_give_nothing_away_and_are_not_waited_for(cats):
    secret = cats.parent / "secret"
    secret.write_text("root:x:0:0" + "x" * 5000)
    place = cats.parent / "cat" / "p1.txt"
    links = [partial(place.symlink_to, secret), partial(place.symlink_to, "/dev/zero")]
    for make in (*links, partial(os.mkfifo, place), place.mkdir):
        make()
        _, findings = scan_manifest(cats)
        assert findings and not any("root:x" in one.line() for one in findings)
        place.rmdir() if place.is_dir() else place.unlink()


def test_a_manifest_lists_captions_in_order_or_by_name(photo_folder):
    path = photo_folder / "m.jsonl"
    row = {"subject": "cat", "class": "cat", "images": ["cat/p10.png", "cat/p2.PNG"]}
    for listed in (["ten {subject}", ""], {"p10.png": "ten {subject}"}, {"cat/p10.png": "ten {subject}"}):
        path.write_text(json.dumps({**row, "captions": listed}))
        (subject,) = read_manifest(path)
        assert [photo.name for photo in subject.images] == ["p2.PNG", "p10.png"]
        assert subject.captions == ("", "ten {subject}")
    path.with_suffix(".yaml").write_text(
        "- {subject: cat, class: cat, images: cat, captions: {p1.png: '[trigger] one', p2.PNG: }}\n"
    )
    (subject,) = read_manifest(path.with_suffix(".yaml"))
    assert subject.captions == ("[trigger] one", "", "")


def test_every_placeholder_of_prompts_is_one_of_captions():
    text = "a [trigger] of {class}, {identifier}: {subject}"
    assert check_caption(text) == text
    with pytest.raises(CellError, match="placeholder"):
        check_caption("{Identifier}")


def test_shards_hold_each_photos_caption_and_know_when_one_changed(cats, tmp_path):
    out = tmp_path / "shards"
    (plain,) = read_manifest(cats)

    def digest(subject):
        return source_digest(source_lines([subject], CONFIG.data), CONFIG.data)

    before = digest(plain)
    captions(cats, **{"p1.txt": "{subject} one"})
    index = shard_subjects(*scan_manifest(cats), out, CONFIG, str)
    samples = list(read_samples(out, index.entries))
    assert [(one.caption, one.meta.get(OWN)) for one in samples] == [("{subject} one", True), ("", None), ("", None)]
    assert index.source != before == digest(replace(plain, captions=("", "", "")))
    captions(cats, **{"p1.txt": "{subject} two"})
    with pytest.raises(DataError, match="caption was"):
        shard_subjects(*scan_manifest(cats), out, CONFIG, str)
    assert Index.load(out) == index
