"""A sheet holds every image, captioned, and each image lies alone beside it."""

import hashlib

from PIL import Image

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
