"""Thumbnails: small, named by what they show, made once, and deleted when no page shows them."""

import io

import pytest
from PIL import Image

from dbtrain.errors import DataError
from dbtrain.report.pictures import NAME, Thumbnails, put


def png(width, height, colour="red"):
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


def refused():
    raise AssertionError("an existing thumbnail was made again")


@pytest.mark.parametrize("size, small", [((300, 200), (192, 128)), ((40, 60), (40, 60))])
def test_a_thumbnail_is_small_and_says_its_size(tmp_path, size, small):
    made = Thumbnails(tmp_path).of("a", lambda: png(*size))
    assert (made["width"], made["height"]) == small and NAME.fullmatch(made["src"])
    with Image.open(tmp_path / made["src"]) as image:
        assert (image.size, image.format) == (small, "JPEG")


def test_a_thumbnail_is_made_once_unless_all_is_made_anew(tmp_path):
    first = Thumbnails(tmp_path).of("a", lambda: png(20, 20))
    assert Thumbnails(tmp_path).of("a", refused) == first
    with pytest.raises(AssertionError):
        Thumbnails(tmp_path, fresh=True).of("a", refused)
    assert Thumbnails(tmp_path).of("b", lambda: png(20, 20))["src"] != first["src"]


def test_what_is_no_image_leaves_no_file(tmp_path):
    with pytest.raises(DataError):
        Thumbnails(tmp_path).of("a", lambda: b"no image")
    assert list(tmp_path.iterdir()) == []


def test_only_thumbnails_that_no_page_shows_are_deleted(tmp_path):
    before = Thumbnails(tmp_path)
    kept, gone = (before.of(identity, lambda: png(20, 20))["src"] for identity in "ab")
    (tmp_path / "notes.jpg").write_bytes(b"mine")
    after = Thumbnails(tmp_path)
    after.of("a", refused)
    after.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {kept, "notes.jpg"} and gone != kept


def test_a_file_is_replaced_and_no_other_is_left(tmp_path):
    for content in (b"first", b"second"):
        put(tmp_path / "page.html", content)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("page.html", b"second")]
