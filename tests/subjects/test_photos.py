"""Photos that a cell names: ways that agree, their order, and cells that name none."""

import pytest

from dbtrain.subjects.finding import CellError
from dbtrain.subjects.photos import natural_key, photos_of


@pytest.mark.parametrize("images", ["cat/p1.png;cat/p10.png;cat/p2.PNG", "cat", "cat/*", "c?t/p*", "./cat/"])
def test_ways_to_name_images_agree(photo_folder, images):
    assert [photo.name for photo in photos_of(images, photo_folder)] == ["p1.png", "p2.PNG", "p10.png"]


def test_photos_outside_the_folder_are_allowed(photo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    assert len(photos_of(str(photo_folder / "cat"), folder)) == 3


def test_natural_order():
    names = ["p10", "P2", "p1", "2", "10", "p", "p02", "²"]
    assert sorted(names, key=natural_key) == ["2", "10", "p", "p1", "P2", "p02", "p10", "²"]


def test_a_list_is_the_photos_of_its_parts(photo_folder):
    photos = photos_of(["cat/p10.png", "tiger"], photo_folder)
    assert photos == (photo_folder / "cat" / "p10.png", photo_folder / "tiger" / "a.jpg")


def test_a_file_with_a_semicolon_or_a_bracket_in_its_name_is_that_file(photo_folder):
    for name in ("a;b.png", "a[1].png"):
        (photo_folder / name).write_bytes(b"1")
        assert photos_of(name, photo_folder) == (photo_folder / name,)


@pytest.mark.parametrize("cell", [[3], "", "a\0.png", "lost.png", "cat/p1.png;cat", "none/*", ";", " ; "])
def test_cells_that_name_no_photo_are_refused(photo_folder, cell):
    with pytest.raises(CellError):
        photos_of(cell, photo_folder)
