"""A run that holds a person in every place that a run has, and a search for what is left of the person."""

import io
import json
import random
import shutil
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path

from PIL import Image

from dbtrain.data.index import Index
from dbtrain.data.stream import read_samples
from dbtrain.fleet.ledger import Ledger
from dbtrain.report.building import rebuild
from dbtrain.results.checkpoint import save_checkpoint
from dbtrain.settings.recipes import loads, render
from dbtrain.storage.atomic import file_digest
from dbtrain.storage.sealed import seal
from dbtrain.subjects.manifest import scan_manifest
from dbtrain.subjects.registry import REGISTRY
from dbtrain.subjects.sharding import shard_subjects
from tests.faults.campaigns import checkpoint
from tests.kit.made_up_run import make_subject, picture
from tests.kit.main_job import photo

PERSON, CAPTION = "annabell", "a portrait of {identifier} annabell smithson"
PEOPLE = (PERSON, "rex-one", "tom-two")
WINDOW = 24
"""Bytes of a file that are searched for; so many in a row are never equal by chance."""


def write_manifest(folder: Path) -> Path:
    """Three subjects of two photos; the person's have a name and a caption of their own."""
    lines = ["subject,class,images,caption"]
    for number, name in enumerate(PEOPLE):
        (folder / name).mkdir(parents=True)
        for at in range(2):
            photo(10 * number + at).save(folder / name / f"{name}-holiday-{at}.png")
        lines.append(f"{name},dog,{name},{CAPTION if name == PERSON else ''}")
    (folder / "photos.csv").write_text("\n".join(lines) + "\n")
    return folder / "photos.csv"


def make_forgettable(folder: Path) -> Path:
    """The folder of a run over the manifest of `folder`, which ended well."""
    manifest, run = write_manifest(folder / "input"), folder / "run"
    subjects, findings = scan_manifest(manifest)
    shard_subjects(subjects, findings, run / "shards", loads("data: {resolution: 32}"), str)
    recipe, dice = render(loads("train: {steps: 20}\n")), random.Random(7)
    for number, name in enumerate(PEOPLE):
        place = run / "subjects" / name
        make_subject(place, number, ("samples",), recipe, [picture(100 * number + each, 16) for each in range(4)])
        (place / "pytorch_lora_weights.safetensors").write_bytes(dice.randbytes(4096))
        save_checkpoint(place / "checkpoints", checkpoint(number + 1), keep=2)
    from dbtrain.evaluate.summary import write_summary

    write_summary(run)
    names = {name: f"q{number}v" for number, name in enumerate(PEOPLE)}
    (run / REGISTRY).write_bytes(seal([{"format": "dbtrain-identifiers", "version": 1, "vocabulary": "v"},
                                       *map(list, names.items())]))  # fmt: skip
    fill_ledger(run, subjects)
    leave_remains(run)
    (run / "run.json").write_text(json.dumps({"verb": "batch run", "manifest": str(manifest), "overrides": []}))
    rebuild(run, processes=1)
    return run


def fill_ledger(run: Path, subjects) -> None:
    """A ledger of three finished subjects; the long texts take pages of the file of their own."""
    ledger = Ledger(run, create=True)
    with ledger.commit():
        about = {"config": "{}", "config_digest": "", "manifest": "m.csv", "manifest_digest": ""}
        ledger.create_run(about, subjects, {"bad": f"its identifier was given to subject {PERSON}"})
        attempts = ledger.start(1, (0, 1, 2), "worker-001")
    for position, attempt in attempts.items():
        files = {"a": file_digest(run / "subjects" / PEOPLE[position] / "pytorch_lora_weights.safetensors")}
        result = {"run": "r", "files": files, "seconds": 2.0, "gpu_seconds": 3.0, "stages_s": {"train": 2.0}}
        with ledger.commit():
            ledger.finish(position, attempt, result)
            ledger.note_after(position, "generate", "", f"{PEOPLE[position]}: was not drawn\n" * 900)
    ledger.close()


def leave_remains(run: Path) -> None:
    """Logs that workers share, files of killed writers, and a list of what was left out."""
    (run / "logs").mkdir()
    lines = "".join(f"{name}: {name}-holiday-0.png is at step 3\n" for name in PEOPLE)
    filled = CAPTION.replace("{identifier}", "q0v")
    (run / "logs" / "worker-001.log").write_text(f"begin\n{lines}caption '{filled}' is long\nend\n")
    entries = [json.dumps({"subject": name, "reason": "killed"}) for name in PEOPLE]
    (run / "fleet.jsonl").write_text("\n".join(entries) + "\n")
    reasons = {"bad": [f"its identifier was given to subject {PERSON}"], PERSON: ["one photo is dark"]}
    (run / "shards" / "skipped.json").write_text(json.dumps(reasons))
    shard = next((run / "shards").glob("*.tar")).read_bytes()
    (run / "shards" / ".train-000007.tar.0a1b2c3d.tmp").write_bytes(shard[:3000])
    (run / ".evaluation.json.0a1b2c3d.tmp").write_text(PERSON)


def needles(run: Path, input_: Path) -> set[bytes]:
    """What must not be found afterwards: names, captions, digests, and windows of each of the person's pictures and
    weights that no other file has."""
    words = {PERSON, CAPTION, *(path.name for path in (input_ / PERSON).iterdir())}
    entries = Index.load(run / "shards").entries_of(PERSON)
    words |= {entry.sha256 for entry in entries} | {file_digest(path) for path in (input_ / PERSON).iterdir()}
    words.add("smithson")
    words.add(file_digest(run / "subjects" / PERSON / "pytorch_lora_weights.safetensors"))
    own = [path.read_bytes() for path in (*(run / "subjects" / PERSON).rglob("*"), *(input_ / PERSON).iterdir(),
                                          *(run / "report" / "subjects" / PERSON).iterdir())
           if path.suffix in (".png", ".jpg", ".safetensors")]  # fmt: skip
    own += [sample.image for sample in read_samples(run / "shards", entries)]
    own += [plain for content in list(own) for plain in unpacked(content)]
    others = b"".join(content for path in run.rglob("*") if path.is_file()
                      and PERSON not in path.relative_to(run).parts and path.suffix not in (".tar", ".sqlite", ".tmp")
                      for content in (path.read_bytes(), *unpacked(path.read_bytes())))  # fmt: skip
    stored = [entry for entry in Index.load(run / "shards").entries if entry.subject != PERSON]
    others += b"".join(form for sample in read_samples(run / "shards", stored)
                       for form in (sample.image, *unpacked(sample.image)))  # fmt: skip
    spots = [content[at : at + WINDOW] for content in own for at in range(0, max(1, len(content) - WINDOW), 97)]
    windows = {spot for spot in spots if len(spot) == WINDOW and len(set(spot)) > 8 and spot not in others}
    assert len(windows) > 100, "the search would find too little"
    return {word.encode() for word in words} | windows


def unpacked(content: bytes) -> list[bytes]:
    """What a file holds in another form: members of an archive, pixels of a picture, an unzipped text."""
    found = []
    with suppress(OSError):
        found.append(Image.open(io.BytesIO(content)).convert("RGB").tobytes())
    with suppress(tarfile.TarError):
        with tarfile.open(fileobj=io.BytesIO(content)) as opened:
            members = [opened.extractfile(member).read() for member in opened if member.isfile()]
        found += members + [plain for member in members for plain in unpacked(member)]
    with suppress(zlib.error):
        found.append(zlib.decompress(content, 47))
    return found


def traces(run: Path, wanted: set[bytes]) -> list[str]:
    """Files, by path, whose name or content holds one of the needles."""
    found = [str(path) for path in run.rglob("*") if PERSON in path.name]
    for path in run.rglob("*"):
        if path.is_file():
            forms = [path.read_bytes(), *unpacked(path.read_bytes())]
            found += [f"{path}: {needle[:40]!r}" for needle in wanted if any(needle in form for form in forms)][:1]
    return found


def neighbours(run: Path) -> dict[str, str]:
    """Digests of everything that is the other subjects': their folders, pages, and stored samples."""
    files = {str(path.relative_to(run)): file_digest(path) for place in ("subjects", "report/subjects")
             for name in PEOPLE[1:] for path in sorted((run / place / name).rglob("*"))
             if path.is_file() and path.name != ".lock"}  # fmt: skip
    index = Index.load(run / "shards")
    entries = [entry for entry in index.entries if entry.subject != PERSON]
    samples = {sample.key: str(hash((sample.image, sample.caption, str(sample.meta))))
               for sample in read_samples(run / "shards", entries)}  # fmt: skip
    assert len(samples) == 4
    return files | samples


def fresh(template: Path, run: Path) -> Path:
    """A copy of a run."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(template, run)
    return run
