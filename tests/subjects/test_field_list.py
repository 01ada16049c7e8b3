"""What users ran into with photos, captions and manifests, row by row: the reported case first, then its neighbours.

The names of the rows are those of the list that this was built from. Each case goes through manifest and preflight, as
`dbtrain preflight` does. Two rows stand elsewhere: D6 in `test_tars.py`, I1 in `test_identifiers.py`.
"""

import csv
import io
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from dbtrain.data.images import open_photo
from dbtrain.errors import ConfigError, DataError
from dbtrain.priors.own_images import import_images
from dbtrain.priors.store import imported_key, read_priors
from dbtrain.settings.config import RunConfig
from dbtrain.settings.recipes import loads
from dbtrain.subjects.finding import defects
from dbtrain.subjects.foreign import from_imagefolder, from_kohya
from dbtrain.subjects.manifest import scan_manifest
from dbtrain.subjects.preflight import sift
from dbtrain.subjects.prompts import fill
from tests.kit.made_photos import jpeg, picture, png

CONFIG = RunConfig.model_validate({"data": {"resolution": 32}})
TABLE = b'{"file_name": "1.jpg", "text": "a {subject} asleep"}'


class Case(NamedTuple):
    """A row's name, files with what they hold (empty is a photo), the manifest's text, and what must come of it: the
    names of the photos that are used, None where the subject is refused; and what is said."""

    row: str
    files: dict[str, bytes]
    manifest: str
    expected: list[str] | None
    said: str = ""
    ending: str = "csv"


def plain(images: str, names: str, expected: str | None, said: str = "", row: str = "", **more: bytes) -> Case:
    """A case of one subject whose manifest has the required columns alone."""
    out = io.StringIO()
    csv.writer(out).writerows([["subject", "class", "images"], ["rex", "dog", images]])
    files = {**dict.fromkeys(names.split(), b""), **more}
    return Case(row, files, out.getvalue(), None if expected is None else expected.split(), said)


ONE = {"p/1.jpg": b""}
CASES = [
    # Endings that Pillow does not list, and content that says what the name does not.
    plain("p", "p/1.jpg p/2.jfif p/3.jpe p/4.JFIF", "1.jpg 2.jfif 3.jpe 4.JFIF", row="P3"),
    plain("p", "p/1 p/2.jpg_large p/3.jpg!d", "1 2.jpg_large 3.jpg!d", row="P3"),
    plain("p/*", "p/1.jif p/2.txt", "1.jif", "'2.txt'", row="P3", **{"p/2.txt": b"a caption of none"}),
    plain("p", "p/1.jpg", None, "a raw photo", row="D5", **{"p/2.cr2": b"II*\0" + bytes(60)}),
    plain("p", "p/1.jpg", None, "JPEG XL", row="D5", **{"p/2.jpg_orig": b"\xff\x0a"}),
    plain("p", "p/1.jpg", "1.jpg", "'film.mp4'", row="D5", **{"p/film.mp4": b"\0\0\0\x14ftypisom"}),
    plain("p/*.jpg", "p/1.JPG p/2.jpg", "1.JPG 2.jpg", row="P5"),
    plain("p/*.WebP", "p/1.webp p/2.WEBP", "1.webp 2.WEBP", row="P5"),
    plain("*/**/*.Png", "p/1.PNG p/q/2.png p/q/3.jpg", "1.PNG 2.png", row="P5"),
    # Captions beside photos.
    plain("p", "p/1.jpg p/2.jpg", "1.jpg 2.jpg", "1 of 2 photos from: txt", row="D1", **{"p/1.txt": b"{subject}"}),
    plain("p", "p/1.jpg", "1.jpg", "from: caption", row="D1", **{"p/1.caption": b"\xef\xbb\xbf{subject}\r\n"}),
    plain("p/1.jpg", "p/1.jpg p/2.jpg", "1.jpg", "captions of 1 of 1", row="D1", **{"p/1.txt": b"{subject}"}),
    plain("p", "p/1.jpg", "1.jpg", "from: jsonl", row="D2", **{"p/metadata.jsonl": TABLE}),
    plain("p", "p/1.jpg", "1.jpg", "from: csv", row="D2", **{"p/metadata.csv": b"prompt;image\n{subject};1.jpg\n"}),
    plain("p", "p/1.jpg", "1.jpg", "'9.jpg'; metadata.jsonl has captions", row="D2",
          **{"p/metadata.jsonl": TABLE + b"\n" + TABLE.replace(b"1.jpg", b"9.jpg")}),
    # Folders of other tools.
    plain("p", "p/10_zorbo_gadget/1.jpg", None, "import kohya", row="D3"),
    plain("p", "p/1_dog/1.jpg p/1_dog/1.txt", None, "import kohya", row="D3"),
    plain("p", "p/train/dog/1.jpg", None, "import imagefolder", row="D3"),
    # Tables as programs write them.
    Case("M1", ONE, "subject;class;images\nrex;dog;p\n", ["1.jpg"]),
    Case("M1", ONE, "subject\tclass\timages\nrex\tdog\tp\n", ["1.jpg"]),
    Case("M1", ONE, "\ufeffsubject|class|images\r\nrex|dog|p\r\n", ["1.jpg"]),
    Case("M2", ONE, "Subject,Class,Images\nrex,dog,p\n", ["1.jpg"]),
    Case("M2", ONE, "subject,class,images,notes\nrex,dog,p,nice\n", ["1.jpg"], "columns that are not read: 'notes'"),
    Case("M2", ONE, "SUBJECT,class,images,Where\nrex,dog,p,\n", ["1.jpg"], "'Where'"),
    Case("M4", ONE, "subject,class,images,steps\nrex,dog,p,42.0\n", ["1.jpg"]),
    Case("M4", ONE, '{"subject": "rex", "class": "dog", "images": "p", "seed": 1e3}', ["1.jpg"], "", "jsonl"),
    Case("M4", ONE, "subject,class,images,rank\nrex,dog,p,4.5\n", None, "column rank"),
    plain("~/p", "p/1.jpg", None, "~ is not replaced", row="M5"),
    plain("${HOME}/p/*.jpg", "p/1.jpg", None, "variables are not replaced", row="M5"),
    plain("p\\1.jpg", "p/1.jpg", None, "write 'p/1.jpg' (which exists here)", row="M5"),
    Case("M8", ONE, "subject,class,images,caption\nrex,dog,p,a photo of [trigger] {class}\n", ["1.jpg"]),
    Case("M8", ONE, "subject,class,images,caption\nrex,dog,p,{subject} on grass\n", ["1.jpg"]),
    Case("M8", ONE, "subject,class,images,caption\nrex,dog,p,a photo of {name}\n", None, "placeholder '{name}'"),
]  # fmt: skip


def content(name: str) -> bytes:
    """A photo, no two alike, in the format that its name says, or as a JPEG."""
    out, seed = io.BytesIO(), sum(name.encode())
    form = {".png": "PNG", ".webp": "WEBP"}.get(Path(name).suffix.lower(), "JPEG")
    turned = picture(seed=seed).rotate(90 * (seed % 4), expand=True)
    turned.save(out, form)
    return out.getvalue()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_a_row_of_the_list_and_its_neighbours(tmp_path, case):
    for name, held in case.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(held or content(name))
    path = tmp_path / f"m.{case.ending}"
    path.write_text(case.manifest, encoding="utf-8")
    subjects, findings = sift(*scan_manifest(path), CONFIG)
    lines = "\n".join(one.line() for one in findings)
    assert case.said in lines, lines
    if case.expected is None:
        assert not subjects and defects(findings)
    else:
        assert not defects(findings) and [photo.name for photo in subjects[0].images] == case.expected, lines


def test_each_row_has_its_neighbours():
    rows = [case.row for case in CASES]
    assert {row: rows.count(row) for row in rows} == dict.fromkeys(rows, 3)


@pytest.mark.parametrize("names", [("1.jpg", "2.jfif"), ("1.jpe", "2.JFIF", "3"), ("1.png", "2.jpg_large", "3.jif")])
def test_class_images_are_known_by_their_content_too(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(content(name))
    store, config = tmp_path / "store", CONFIG.replaced("prior.sampler", "imported")
    assert import_images(tmp_path, "dog", store, config, str)[0] == len(names)
    assert len(read_priors(store, imported_key(config, "dog"), len(names))) == len(names)


@pytest.mark.parametrize("size", [(8192, 6144), (12288, 9216), (16320, 12240)])
def test_todays_phones_are_below_the_cap(size):
    """P11: 50, 108 and 200 megapixels; nothing of that size is decoded, the header decides."""
    content = bytearray(png(picture(32, 32)))
    content[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match="damaged|cut short"):
        open_photo(bytes(content))
    with pytest.raises(DataError, match="the cap is 40 million"):
        open_photo(bytes(content), max_pixels=40_000_000)


@pytest.mark.parametrize(("side", "resolution", "noted"), [(100, 512, True), (380, 512, True), (400, 512, False)])
def test_photos_far_too_small_are_noted(tmp_path, side, resolution, noted):
    """P14."""
    (tmp_path / "1.jpg").write_bytes(jpeg(Image.effect_noise((side + 40, side), 90).convert("RGB")))
    (tmp_path / "m.csv").write_text("subject,class,images\nrex,dog,1.jpg\n")
    findings = sift(*scan_manifest(tmp_path / "m.csv"), RunConfig(data={"resolution": resolution}))[1]
    assert [f"short side of {side} px" in one.what for one in findings if one.note] == [True] * noted


@pytest.mark.parametrize("name", ["10_zorbo gadget", "1_zorbo old gadget", "100_zorbo  gadget"])
def test_folders_of_kohyas_trainers_are_imported(tmp_path, name):
    """D3."""
    (tmp_path / "img" / name).mkdir(parents=True)
    (tmp_path / "img" / name / "1.jpg").write_bytes(content("1.jpg"))
    (tmp_path / "img" / name / "1.txt").write_text("a zorbo gadget asleep")
    imported = from_kohya(tmp_path)
    imported.write(tmp_path / "m.jsonl")
    (subject,), findings = sift(*scan_manifest(tmp_path / "m.jsonl"), CONFIG)
    assert not defects(findings) and subject.identifier == "zorbo" and subject.class_noun == " ".join(name.split()[1:])
    assert subject.captions == ("a zorbo gadget asleep",)
    assert from_imagefolder(tmp_path / "img" / name, "gadget").rows[0]["class"] == "gadget"


@pytest.mark.parametrize(("text", "steps"), [("1e3", 1000), ("42.0", 42), ("4.2e1", 42), ("4.25", None)])
def test_whole_is_whole_in_settings(text, steps):
    """M4."""
    if steps is not None:
        assert loads("", "r", [f"train.steps={text}"]).train.steps == steps
        return
    with pytest.raises(ConfigError, match=r"train\.steps"):
        loads("", "r", [f"train.steps={text}"])


@pytest.mark.parametrize("text", ["a [trigger] {class}", "a {identifier} {class}", "a {subject}"])
def test_placeholders_are_the_same_in_captions_and_prompts(text):
    """M8."""
    config = loads("", "r", [f"data.caption={text}", f"sample.prompts=[{json.dumps(text)}]"])
    filled = [fill(one, identifier="srx", class_noun="dog") for one in (config.data.caption, *config.sample.prompts)]
    assert filled == ["a srx dog"] * 2
