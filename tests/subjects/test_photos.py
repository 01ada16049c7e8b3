"""Photos that a cell names: ways that agree, their order, and cells that name none."""

import pytest

from dbtrain.subjects.finding import CellError
from dbtrain.subjects.photos import find_photos, natural_key, photos_of
from tests.kit.made_photos import jpeg, picture, png


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


JPEG, PNG = jpeg(picture()), png(picture())
NAMES = ["01.jpg", "02.jfif", "03.jpe", "04.JFIF", "05", "06.jpg_large", "07.MPO", "08.gif"]


def test_content_decides_what_a_photo_is_whatever_it_is_called(tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(PNG if number % 3 else JPEG)
    found = find_photos(str(tmp_path), tmp_path)
    assert [photo.name for photo in found.photos] == NAMES and not found.unused
    assert photos_of("05;02.jfif", tmp_path) == (tmp_path / "02.jfif", tmp_path / "05")


UNUSED = {
    "Thumbs.db": (b"\xd0\xcf", "a file that a system"),
    ".DS_Store": (b"\0", "a file that a system"),
    "._01.jpg": (b"\0\5\x16\7", "a file that a system"),
    ".hidden.jpg": (JPEG, "hidden by its name"),
    "notes.pdf": (b"%PDF-1.7", "no picture"),
    "clip.mov": (b"\0\0\0\x14ftypqt  ", "no picture"),
    "02.txt": (b"a caption", "a caption without a photo"),
    "01.jpg~": (JPEG, "a left-over"),
    "01.jpg.bak": (JPEG, "a left-over"),
    "01.json": (b"{}", "another program's"),
    "01.CR2": (b"II*\0" + bytes(60), "a raw photo beside the developed one"),
}


def test_every_file_that_is_not_used_is_named_once_with_its_reason(tmp_path):
    (tmp_path / "01.jpg").write_bytes(JPEG)
    (tmp_path / "more").mkdir()
    for name, (content, _) in UNUSED.items():
        (tmp_path / name).write_bytes(content)
    found = find_photos(str(tmp_path), tmp_path)
    assert [photo.name for photo in found.photos] == ["01.jpg"]
    reasons = {name: reason for reason, names in found.unused.items() for name in names}
    assert reasons.keys() == {*UNUSED, "more"} and sum(map(len, found.unused.values())) == len(reasons)
    for name, (_, reason) in UNUSED.items():
        assert reasons[name].startswith(reason), name
    assert sum(what.count("01.jpg~") for what, _ in found.notes()) == 1


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.dng", b"II*\0" + bytes(60), "a raw photo"),
        ("a.nef", b"MM\0*" + bytes(60), "a raw photo"),
        ("a.RAF", b"FUJIFILMCCD-RAW ", "a raw photo"),
        ("a.CR3", b"\0\0\0\x18ftypcrx \0", "a raw photo"),
        ("a.arw", b"?", "a raw photo"),
        ("a.tif", b"II*\0" + bytes(60), "TIFF that is not read"),
        ("a", b"II*\0" + bytes(60), "TIFF that is not read"),
        ("a.gif", b"GIF89a", "GIF that is not read"),
        ("a.jxl", b"\xff\x0a", "JPEG XL that is not read"),
        ("a.bmp", b"", "a picture that is not read"),
    ],
)
def test_pictures_that_are_not_read_are_refused_by_name(tmp_path, name, content, part):
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CellError) as caught:
        photos_of(str(tmp_path), tmp_path)
    assert f"holds {name!r}, {part}" in caught.value.args[0]
    with pytest.raises(CellError):
        photos_of(name, tmp_path)


def test_a_phones_photo_without_the_extra_says_what_to_install(tmp_path, monkeypatch):
    able = {"JPEG": "JPEG", "PNG": "PNG", "WebP": "WEBP"}
    monkeypatch.setattr("dbtrain.subjects.photos.readable", lambda: able)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    for cell in (str(tmp_path), "IMG_1.HEIC"):
        with pytest.raises(CellError) as caught:
            photos_of(cell, tmp_path)
        assert "dbtrain[photos]" in caught.value.args[2]


@pytest.mark.parametrize("pattern", ["*.jpg", "*.JPG", "[A-Z].Jpg", "**/*.jpg", "./*.jpg"])
def test_a_pattern_with_an_image_ending_matches_it_in_any_case(tmp_path, pattern):
    for name in ("A.JPG", "B.jpg", "C.jpeg"):
        (tmp_path / name).write_bytes(JPEG)
    assert [photo.name for photo in photos_of(pattern, tmp_path)] == ["A.JPG", "B.jpg"]


@pytest.mark.parametrize("folder", ["photos [1]", "a*b", "10_x [y]/in [z]"])
def test_brackets_in_folders_that_exist_stand_for_themselves(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "1.png").write_bytes(PNG)
    for cell in (f"{folder}/*.png", folder, f"{tmp_path}/{folder}/*.png"):
        assert [photo.name for photo in photos_of(cell, tmp_path)] == ["1.png"]


@pytest.mark.parametrize(("inside", "part"), [("10_zorbo gadget", "import kohya"), ("rex", "import imagefolder")])
def test_a_folder_of_folders_says_what_to_run(tmp_path, inside, part):
    (tmp_path / inside).mkdir()
    (tmp_path / inside / "1.png").write_bytes(PNG)
    with pytest.raises(CellError) as caught:
        photos_of(str(tmp_path), tmp_path)
    assert part in caught.value.args[2] and "holds no photo, but folders" in caught.value.args[0]
