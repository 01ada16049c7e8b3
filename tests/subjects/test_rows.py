"""Rows of manifest files: four formats with the same cells, and files that cannot be read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dbtrain.errors import DataError
from dbtrain.subjects.manifest import read_manifest
from dbtrain.subjects.rows import ManifestRow, read_rows

CELLS = [{"subject": "cat", "images": ["a.png", "b.png"], "seed": 3}, {"subject": "no", "images": None, "seed": None}]


def test_cells_and_places_of_every_format(tmp_path):
    (tmp_path / "m.csv").write_text("subject, images,seed\ncat,a.png;b.png,3\n\nno,,\n")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(cells) + "\n\n" for cells in CELLS))
    (tmp_path / "m.yaml").write_text("- subject: cat\n  images: [a.png, b.png]\n  seed: 3\n- {subject: no, seed: ~}\n")
    pq.write_table(pa.Table.from_pylist(CELLS), tmp_path / "m.parquet")
    csv = [ManifestRow(2, {"subject": "cat", "images": "a.png;b.png", "seed": "3"}),
           ManifestRow(4, {"subject": "no", "images": None, "seed": None})]  # fmt: skip
    assert read_rows(tmp_path / "m.csv") == csv
    assert read_rows(tmp_path / "m.jsonl") == [ManifestRow(1, CELLS[0]), ManifestRow(3, CELLS[1])]
    assert read_rows(tmp_path / "m.yaml") == [
        ManifestRow(1, {**CELLS[0], "seed": "3"}),
        ManifestRow(4, {"subject": "no", "seed": None}),
    ]
    assert read_rows(tmp_path / "m.parquet") == [ManifestRow(1, CELLS[0]), ManifestRow(2, CELLS[1])]


@pytest.mark.parametrize(
    "text",
    [
        "subject,class,images,\na,b,cat,\n",
        "subject,class,images,,\na,b,cat,,\n,,,,\n",
        "subject,class,images\na,b,cat,,\n",
        "subject,class,,images, \na,b, ,cat\n",
    ],
)
def test_columns_that_a_spreadsheet_left_empty_are_none(photo_folder, text):
    (photo_folder / "m.csv").write_text(text)
    (row,) = read_rows(photo_folder / "m.csv")
    assert {name: cell for name, cell in row.cells.items() if cell} == {"subject": "a", "class": "b", "images": "cat"}


BAD_FILES = [
    ("m.csv", b"subject,class,images\ncat,\xff,cat\n", "line 2 is not UTF-8"),
    ("m.csv", b"", "has no rows"),
    ("m.csv", b"subject,class,class,images\n", "stands twice"),
    ("m.csv", b"subject,class,images\ncat,cat,cat,cat\n", "has 4 cells for 3 columns"),
    ("m.csv", b'subject,class,images\n"cat"x,cat,cat\n', "is no CSV"),
    ("m.jsonl", b"{", "m.jsonl:1: is no JSON"),
    ("m.jsonl", b"[1]", "write one object a line"),
    ("m.jsonl", b'{"subject": "a", "subject": "b"}', "stands twice"),
    ("m.jsonl", b"[" * 100_000, "m.jsonl"),
    ("m.yaml", b"a: [", "is no YAML"),
    ("m.yaml", b"subject: a", "no list"),
    ("m.yaml", b"- &a {subject: x}\n- *a\n", "alias"),
    ("m.yaml", b"- subject: !!python/object/apply:os.system ['touch pwned']\n", "tag"),
    ("m.yaml", b"- " + b"[" * 600 + b"]" * 600, "nested more than 16 deep"),
    ("m.yaml", b"- {subject: a, subject: b}", "column twice"),
    ("m.parquet", b"PAR1 nonsense", "Parquet"),
    ("m.xlsx", b"", "is no manifest by its ending"),
]


@pytest.mark.parametrize(("name", "content", "part"), BAD_FILES)
def test_broken_files_end_in_a_word_not_a_traceback(photo_folder, name, content, part):
    (photo_folder / name).write_bytes(content)
    with pytest.raises(DataError, match=part):
        read_manifest(photo_folder / name)


@pytest.mark.parametrize(
    "text",
    [
        "subject;images;seed\ncat;a.png;3\n",
        "subject\timages\tseed\ncat\ta.png\t3\n",
        "subject|images|seed\r\ncat|a.png|3\r\n",
        "sep=;\r\nsubject;images;seed\r\ncat;a.png;3\r\n",
        "subject,images,seed\ncat,a.png,3\n",
    ],
)
def test_every_separator_of_spreadsheets_is_read(tmp_path, text):
    (tmp_path / "m.csv").write_text(text, newline="")
    (row,) = read_rows(tmp_path / "m.csv")
    assert row == ManifestRow(3 if text.startswith("sep") else 2, {"subject": "cat", "images": "a.png", "seed": "3"})


def test_a_list_with_semicolons_among_commas_stays_one_cell(tmp_path):
    (tmp_path / "m.csv").write_text("subject,images\ncat,a.png;b.png;c.png\n")
    assert read_rows(tmp_path / "m.csv")[0].cells["images"] == "a.png;b.png;c.png"
