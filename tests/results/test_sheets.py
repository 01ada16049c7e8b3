"""A sheet holds every image, captioned, and each image lies alone beside it."""

import hashlib

from PIL import Image

from dbtrain.models.sampling import SMALL
from dbtrain.results.record import read_record, write_record
from dbtrain.results.sheets import grid, publish_sheet
from tests.kit.published import PUBLISHED


def test_grid_and_sheet_hold_every_image(tmp_path):
    rows = [[Image.new("RGB", (8, 8), (10 * i, 20 * j, 30)) for j in range(3)] for i in range(2)]
    sheet = grid(rows)
    assert sheet.size == (3 * 12 + 4, 2 * 12 + 4)
    assert sheet.getpixel((4 + 12 + 3, 4 + 12 + 3)) == (10, 20, 30)
    path = publish_sheet(tmp_path, rows, ["first", "second"], "samples")
    assert path == tmp_path / "samples.png" and Image.open(path).size[0] == 3 * 132 + 4
    singles = sorted((tmp_path / "samples" / "samples").glob("*.png"))
    assert len(singles) == 6 and Image.open(singles[4]).getpixel((0, 0)) == (10, 20, 30)
    write_record(tmp_path, PUBLISHED, [path])
    samples = read_record(tmp_path)["samples"]
    assert samples == {single.name: hashlib.sha256(single.read_bytes()).hexdigest() for single in singles}
    publish_sheet(tmp_path, [row[:2] for row in rows[:1]], ["first"], "samples")
    assert sorted((tmp_path / "samples" / "samples").glob("*.png")) == singles[:2]
    assert not (tmp_path / "samples" / "samples-small").exists()


def test_what_the_first_of_two_stages_drew_lies_beside(tmp_path):
    rows = [[Image.new("RGB", (8, 8)) for _ in range(2)]]
    for number, image in enumerate(rows[0]):
        image.info[SMALL] = Image.new("RGB", (4, 4), (number, 0, 0))
    publish_sheet(tmp_path, rows, ["first"], "samples")
    small = sorted((tmp_path / "samples" / "samples-small").glob("*.png"))
    assert [(path.name, Image.open(path).getpixel((0, 0))[0]) for path in small] == [
        ("prompt-00-image-00.png", 0), ("prompt-00-image-01.png", 1)]  # fmt: skip
    del rows[0][1].info[SMALL]
    publish_sheet(tmp_path, rows, ["first"], "samples")
    assert sorted((tmp_path / "samples" / "samples-small").glob("*.png")) == small[:1]
