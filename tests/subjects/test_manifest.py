import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dbtrain.errors import DataError
from dbtrain.subjects.manifest import read_manifest, scan_manifest, subject_from_folder
from dbtrain.values import Subject

ROWS = [
    {"subject": "cat", "class": "cat", "images": "cat", "caption": "a {identifier} {class}, no", "seed": 3, "lr": 1e-4},
    {"subject": "no", "class": "stuffed animal", "images": "tiger/*.jpg", "identifier": "sks", "steps": 20},
]


def write(folder, ending, rows):
    path = folder / f"m.{ending}"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if ending == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "yaml":
        path.write_text(yaml.safe_dump(rows))
    else:
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), path)
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl", "yaml", "parquet"])
def test_every_format_gives_the_same_subjects(photo_folder, ending):
    cat = tuple(photo_folder / "cat" / name for name in ("p1.png", "p2.PNG", "p10.png"))
    tiger = (photo_folder / "tiger" / "a.jpg",)
    assert read_manifest(write(photo_folder, ending, ROWS)) == [
        Subject("cat", "cat", cat, caption="a {identifier} {class}, no", seed=3, lr=1e-4),
        Subject("no", "stuffed animal", tiger, identifier="sks", steps=20),
    ]


def test_yaml_numbers_and_words_keep_their_meaning(photo_folder):
    path = photo_folder / "m.yaml"
    path.write_text("- {subject: 007, class: no, images: [cat/p10.png, cat/p1.png], lr: 1e-4, seed: ~}\n")
    (subject,) = read_manifest(path)
    assert (subject.id, subject.class_noun, subject.lr, subject.seed) == ("007", "no", 1e-4, None)
    assert [image.name for image in subject.images] == ["p1.png", "p10.png"]


def test_a_cell_without_a_column_is_told_once(photo_folder):
    (photo_folder / "m.csv").write_text("subject,class,images,\na,b,cat,,\nb,b,cat,lost,\nc,b,cat,,lost\n")
    subjects, (found,) = scan_manifest(photo_folder / "m.csv")
    assert found.what == "column '': is unknown" and found.file.endswith("m.csv") and not subjects


HEADERS = {
    "Subject,CLASS,Images": [],
    " subject , class ,images": [],
    "subject,class,images,notes": [(True, "columns that are not read: 'notes'")],
    "subject,class,images,my price,URL": [(True, "'my price', 'URL'")],
    "subject,class,images,stpes": [(False, "column 'stpes': is unknown")],
    "subject,class,images,Identifer": [(False, "column 'Identifer': is unknown")],
    "name,class,images": [(False, "has no column subject"), (True, "'name'")],
    "subject,class_name,images": [(False, "has no column class"), (True, "'class_name'")],
    "subject,class,images,Images": [(False, "has the column images twice")],
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_is_judged_once_for_all_rows(photo_folder, header):
    extra = ",x" * (header.count(",") - 2)
    (photo_folder / "m.csv").write_text(header + "\n" + "".join(f"s{n},cat,cat{extra}\n" for n in range(9)))
    subjects, findings = scan_manifest(photo_folder / "m.csv")
    assert [(one.note, part in one.what) for one, (_, part) in zip(findings, HEADERS[header], strict=True)] == [
        (note, True) for note, _ in HEADERS[header]
    ]
    assert len(subjects) == (0 if any(not note for note, _ in HEADERS[header]) else 9)


BAD_CELLS = [
    ({"subject": "a.b"}, "column subject: got 'a.b', want letters"),
    ({"subject": "../x"}, "column subject: got '../x'"),
    ({"subject": "-x"}, "column subject"),
    ({"subject": "x" * 65}, "column subject"),
    ({"subject": ""}, "column subject: got nothing"),
    ({"class": "  "}, "column class: got nothing"),
    ({"class": "a{b}"}, "column class"),
    ({"images": "nowhere"}, "which does not exist"),
    ({"images": ""}, "column images: got nothing"),
    ({"images": "empty"}, "the folder 'empty' holds no photo"),
    ({"images": "mixed"}, "holds 'x.gif', a picture that is not read here"),
    ({"images": "zzz*.png"}, "the pattern 'zzz*.png' holds no photo"),
    ({"images": "notes.txt"}, "got 'notes.txt'"),
    ({"images": "~/photos"}, "~ is not replaced"),
    ({"images": "~me/*.jpg"}, "~ is not replaced"),
    ({"images": "$HOME/photos"}, "variables are not replaced"),
    ({"images": "${PHOTOS}/rex/*.png"}, "variables are not replaced"),
    ({"images": "%USERPROFILE%/rex"}, "variables are not replaced"),
    ({"images": "cat\\p1.png"}, "folders are separated by /"),
    ({"images": "C:\\photos\\*.jpg"}, "folders are separated by /"),
    ({"images": "https://host/a.jpg"}, "an address"),
    ({"images": "['cat/p1.png', 'cat/p2.PNG']"}, "a list as a program prints it"),
    ({"images": '"cat/p1.png"'}, "the quotes are part of the name"),
    ({"images": "cat", "captions": ["a"]}, "images is no list of files"),
    ({"images": ["cat/p1.png", "cat/p10.png"], "captions": ["a"]}, "has 1 captions for 2 photos"),
    ({"images": "cat", "captions": {"p3.png": "a"}}, "names 'p3.png'"),
    ({"images": "cat/p1.png;cat/p1.png"}, "twice"),
    ({"images": "pipe.png"}, "not a regular file"),
    ({"images": "x" * 300}, "column images"),
    ({"caption": "x" * 4001}, "got 4001 characters, want at most 4000"),
    ({"caption": "a photo of {who}"}, "placeholder '{who}'"),
    ({"caption": "{identifier.__class__}"}, "placeholder"),
    ({"caption": "{identifier!r}"}, "placeholder"),
    ({"caption": "{identifier"}, "paired braces"),
    ({"caption": "a photo of a dog"}, "does not name the subject"),
    ({"caption": "{identifier}\x1b[31m"}, "control character"),
    ({"identifier": "two words"}, "column identifier"),
    ({"subject": "a\ud800"}, "column subject: got 'a\\ud800', with half a character"),
    ({"class": "dog\ud800"}, "column class: got 'dog\\ud800', with half a character"),
    ({"caption": "{identifier}\udc80"}, "column caption: got"),
    ({"identifier": "x\ud83d"}, "column identifier: got 'x\\ud83d', with half a character"),
    ({"images": "\ud800"}, "got '\\ud800', which does not exist"),
    ({"images": ["\ud800*"]}, "column images"),
    ({"seed": "-1"}, "column seed: got '-1', want a whole number from 0 up"),
    ({"seed": str(2**63)}, "column seed"),
    ({"seed": "1.5"}, "column seed"),
    ({"steps": "0"}, "column steps"),
    ({"steps": "many"}, "column steps: got 'many'"),
    ({"lr": "0"}, "column lr"),
    ({"lr": "nan"}, "column lr"),
    ({"lr": "1"}, "column lr"),
    ({"stpes": "3"}, "column 'stpes': is unknown; did you mean steps?"),
]


def messy(folder):
    for name in ("empty", "mixed"):
        (folder / name).mkdir()
    (folder / "mixed" / "x.gif").write_bytes(b"1")
    (folder / "mixed" / "x.png").write_bytes(b"1")
    (folder / "notes.txt").write_bytes(b"1")
    (folder / "pipe.png").symlink_to("/dev/null")


def test_all_defects_come_in_one_pass_with_their_rows(photo_folder):
    messy(photo_folder)
    sound = {"subject": "sound", "class": "cat", "images": "cat"}
    rows = [sound, *[sound | {"subject": f"s{n}"} | cell for n, (cell, _) in enumerate(BAD_CELLS)]]
    before = sorted(photo_folder.rglob("*"))
    path = write(photo_folder, "jsonl", rows)
    subjects, findings = scan_manifest(path)
    assert [subject.id for subject in subjects] == ["sound"]
    assert len(findings) == len(BAD_CELLS)
    for number, (finding, (cell, part)) in enumerate(zip(findings, BAD_CELLS, strict=True), 2):
        line = finding.line()
        assert line.startswith(f"{path}:{number}: "), line
        assert part in line, (cell, line)
        assert line.isprintable()
        assert finding.remedy
    assert sorted(photo_folder.rglob("*")) == sorted([*before, path])


def test_duplicate_ids_name_both_rows(photo_folder):
    rows = [{"subject": name, "class": "cat", "images": "cat"} for name in ("Rex", "rex", "Rex")]
    with pytest.raises(DataError) as caught:
        read_manifest(write(photo_folder, "csv", rows))
    first, second, third = str(caught.value).splitlines()
    assert "m.csv:2" in first
    assert "'Rex' differs only by case from 'rex' of row 3" in first
    assert "m.csv:3" in second
    assert "'rex' differs only by case from 'Rex' of row 2" in second
    assert "m.csv:4" in third
    assert "'Rex' repeats row 2" in third


def test_subject_from_folder(photo_folder):
    subject = subject_from_folder(photo_folder / "cat", " house cat ")
    assert (subject.id, subject.class_noun, len(subject.images)) == ("cat", "house cat", 3)
    with pytest.raises(DataError, match="class noun"):
        subject_from_folder(photo_folder / "cat", "")
    with pytest.raises(DataError, match="does not exist"):
        subject_from_folder(photo_folder / "dog", "dog")
