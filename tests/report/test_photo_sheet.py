"""The preflight sheet: what it shows of photos, masks and findings, and that it fits in memory."""

import base64
import io
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.report.photo_sheet import OUTLINE, SIDE, outline, thumbnail, write_sheet
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.subjects.finding import Finding
from dbtrain.values import Subject
from tests.kit.made_photos import jpeg, mask_of, picture, png

CONFIG = RunConfig(data=DataConfig(resolution=32))


@pytest.fixture
def subject(tmp_path):
    """A subject with a photo, one with a mask, a wide one, a torn one, and one with a black mask."""
    files = {"a": png(picture()), "b": png(picture()), "c": png(picture(100, 40)), "d": png(picture())[:-40]}
    files |= {"e": png(picture()), "b-mask": png(mask_of()), "e-mask": png(mask_of(left=48))}
    for name, content in files.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    return Subject("rex", "dog", tuple(tmp_path / f"{name}.png" for name in "abcde"))


def made(tmp_path, subjects, findings=(), config=CONFIG):
    write_sheet(tmp_path / "sheet.html", subjects, findings, config)
    return (tmp_path / "sheet.html").read_text()


def items(page):
    """The photos' parts of a page by the photos' names."""
    return {re.search("<b>(.*?)</b>", part)[1]: part for part in re.findall("<li.*?</li>", page, re.DOTALL)}


def decoded(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2]))))


def test_a_photo_is_shown_as_it_is_cropped_with_the_outline_of_its_mask():
    photo, mask = picture(100, 40), mask_of(100, 40, left=50)
    plain = decoded(thumbnail(photo, None, (SIDE, SIDE))).astype(int)
    want = np.asarray(photo.resize((480, SIDE), Image.Resampling.LANCZOS).crop((144, 0, 144 + SIDE, SIDE)))
    assert plain.shape == (SIDE, SIDE, 3) and abs(plain - want).mean() < 3
    masked = decoded(thumbnail(photo, mask, (SIDE, SIDE))).astype(int)
    pink = abs(masked - OUTLINE).max(2) < 60
    assert pink[:, 95:97].all() and not pink[:, :90].any() and not pink[:, 102:].any()


def test_an_outline_is_both_sides_of_an_edge():
    inside = np.zeros((6, 6), bool)
    inside[2:4, 2:4] = True
    edge = outline(inside)
    assert edge.sum() == 12 and edge[1, 2] and edge[2, 2] and not edge[1, 1] and not edge[0].any()
    assert not outline(np.ones((4, 4), bool)).any()


def test_each_photo_has_its_facts_and_its_warnings(tmp_path, subject):
    findings = [
        Finding("rex", str(tmp_path / "d.png"), "is torn", "copy it"),
        Finding("rex", str(tmp_path / "e-mask.png"), "marks nothing", "paint it"),
        Finding("rex", "caption", "has 99 tokens", "shorten it"),
        Finding("", "m.csv:9", "got nothing", "fill it"),
    ]
    page = made(tmp_path, [subject, replace(subject, id="tom", images=subject.images[:1])], findings)
    tom = page.partition('id="tom"')[2]
    shown = items(page.partition('id="tom"')[0])
    assert list(shown) == ["a.png", "b.png", "c.png", "d.png", "e.png"] and list(items(tom)) == ["a.png"]
    assert "48×40, 17% of its width cropped" in shown["a.png"] and "alert" not in shown["a.png"]
    assert "mask 80%" in shown["b.png"] and "mask" not in shown["c.png"]
    assert "leaves out 60%" in shown["c.png"] and "alert warn" in shown["c.png"]
    assert "cannot be trained" in shown["d.png"] and "is torn; copy it" in shown["d.png"]
    assert "<img" not in shown["d.png"]
    assert "<img" in shown["e.png"] and "marks nothing; paint it" in shown["e.png"]
    assert page.count("is torn") == page.count("99 tokens") == page.count("m.csv:9: got nothing; fill it") == 1
    assert 'href="#rex"' in page and 'href="#tom"' not in page


def test_with_buckets_a_photo_is_shown_in_its_shape(tmp_path):
    """A portrait of 3:4 keeps its height; at multiples of 8 in 256 pixels its shape is 288 x 216."""
    for name, size in {"a": (300, 400), "b": (400, 300), "c": (300, 300), "d": (90, 240)}.items():
        (tmp_path / f"{name}.png").write_bytes(png(picture(*size)))
    (tmp_path / "a-mask.png").write_bytes(png(mask_of(300, 400, left=150)))
    subject = Subject("rex", "dog", tuple(tmp_path / f"{name}.png" for name in "abcd"))
    page = made(tmp_path, [subject], (), RunConfig(data=DataConfig(resolution=256, buckets=True)))
    shown = items(page)
    assert "300×400, trained at 216×288, mask 50%" in shown["a.png"] and "alert" not in shown["a.png"]
    assert "400×300, trained at 288×216<" in shown["b.png"] and "300×300, trained at 256×256<" in shown["c.png"]
    assert "trained at 176×352, 25% of its height cropped" in shown["d.png"]
    assert "leaves out 25%" in shown["d.png"] and "enlarged from 90 to 176 px" in shown["d.png"]
    pictures = {name: decoded(re.search('src="(.*?)"', part)[1]) for name, part in shown.items()}
    shapes = [pictures[f"{name}.png"].shape[:2] for name in "abcd"]
    assert shapes == [(216, 162), (162, 216), (SIDE, SIDE), (264, 132)]
    pink = abs(pictures["a.png"].astype(int) - OUTLINE).max(2) < 60
    assert pink[:, 80:82].all() and not pink[:, :76].any()
    assert "nearest to its own, of about 256×256 pixels" in page
    square = items(made(tmp_path, [subject], (), RunConfig(data=DataConfig(resolution=256))))
    assert "25% of its height cropped" in square["a.png"] and "trained at" not in square["a.png"]


def test_small_photos_and_random_crops_are_said(tmp_path, subject):
    large = RunConfig(data=DataConfig(resolution=64, crop="random", mask=False))
    page = made(tmp_path, [subject], (), large)
    assert "enlarged from 40 to 64 px" in items(page)["a.png"] and "leaves out" not in page
    assert "drawn anew each step" in page and "outline" not in re.sub("<style>.*</style>", "", page, flags=re.DOTALL)


def test_everything_of_a_user_is_escaped(tmp_path, subject):
    bad = "<script>x</script>&\"'"
    photo = tmp_path / "<b onload=x>.png"
    photo.write_bytes(png(picture()))
    hostile = replace(subject, class_noun=bad, caption=bad, identifier=bad, images=(photo,))
    page = made(tmp_path, [hostile], [Finding("rex", bad, bad, bad), Finding("", bad, bad, bad)])
    assert "<script" not in page and "<b onload" not in page and page.count("&lt;script&gt;") == 9


def test_the_verb_writes_the_sheet_before_it_refuses(tmp_path, subject):
    (tmp_path / "m.csv").write_text("subject,class,images\nrex,dog,*.png\n")

    def run(*words):
        sheet = str(tmp_path / "sheet.html")
        asked = ["preflight", str(tmp_path / "m.csv"), "--config", "tiny", "--sheet", sheet, *words]
        return CliRunner().invoke(cli.app, asked)

    told = run("data.resolution=32")
    assert told.exit_code == 3 and "d.png" in told.output
    assert len(items((tmp_path / "sheet.html").read_text())) == 5
    (tmp_path / "sheet.html").unlink()
    ready = run(f"data.shards={tmp_path}")
    assert ready.exit_code == 2 and "--sheet" in ready.output and not (tmp_path / "sheet.html").exists()


def test_memory_does_not_grow_with_the_subjects(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(picture(64, 64)))
    peaks = []
    for count in (20, 120):
        many = [Subject(f"s{number}", "dog", (tmp_path / "a.jpg",)) for number in range(count)]
        made(tmp_path, many[:1])
        tracemalloc.start()
        write_sheet(tmp_path / "sheet.html", many, (), CONFIG)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 200_000 < (tmp_path / "sheet.html").stat().st_size
