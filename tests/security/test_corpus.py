"""Hostile input at every door that files come in by: no code runs, nothing else is read, every refusal is a line.

A row of the table is a door and what is put before it. Payloads that get to run leave a file; none may.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

from dbtrain.data.images import open_photo
from dbtrain.data.index import INDEX_NAME, TAR_END, Entry, Index, Shard
from dbtrain.data.stream import read_samples, verify
from dbtrain.errors import DbtrainError
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import adapter
from dbtrain.models.load import load_models
from dbtrain.priors.store import store_damage
from dbtrain.results.checkpoint import latest_checkpoint
from dbtrain.results.identity import Identity
from dbtrain.results.publish import read_lora
from dbtrain.settings.config import DataConfig, ModelConfig
from dbtrain.settings.recipes import load, loads
from dbtrain.storage.kept_tensors import kept_tensor
from dbtrain.subjects.foreign import from_imagefolder, from_kohya
from dbtrain.subjects.manifest import read_manifest, scan_manifest
from dbtrain.subjects.registry import read_registry
from dbtrain.subjects.tars import tar_samples
from tests.kit.main_job import sd_folder

CANARY = Path("canary")


class Payload:
    """What leaves a file when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def as_zip(content: bytes) -> bytes:
    """As `torch.save` packs a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3")
    return out.getvalue()


PICKLES = [pickle.dumps(Payload(), protocol) for protocol in (0, 2, 4)]
PICKLES.append(as_zip(PICKLES[1]))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own, in which no payload may have left anything."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not CANARY.exists()


def refuses(work: Callable[[], object]) -> str:
    """The message by which our own error refuses the work."""
    with pytest.raises(DbtrainError) as caught:
        work()
    assert str(caught.value).strip()
    return str(caught.value)


def photo_manifest(path: Path) -> list:
    Path("m.csv").write_text(f"subject,class,images\na,cat,{path.name}\n")
    return [open_photo(image) for one in read_manifest(Path("m.csv")) for image in one.images]


def load_base(path: str) -> object:
    return load_models(FAMILIES["sd"], ModelConfig(path=path))


def captioned(path: Path) -> object:
    """A subject with this file as a caption: beside its photo, and as a folder's table."""
    for name in (f"1{path.suffix}", f"metadata{path.suffix}"):
        folder = Path(f"captions-{path.stem}-{name}")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / "1.jpeg")
        (folder / name).write_bytes(path.read_bytes())
        Path("m.jsonl").write_text(json.dumps({"subject": "a", "class": "cat", "images": str(folder)}))
        subjects, findings = scan_manifest(Path("m.jsonl"))
        used = [one.captions for one in subjects if one.captions]
        assert not used and (findings or path.suffix in UNREAD), (used, name)
    raise DbtrainError("is no caption")


def foreign_tar(path: Path) -> object:
    return list(tar_samples([path], "a", "cat", DataConfig(resolution=32), str))


UNREAD = (".png", ".jpg", ".webp")
"""Endings under which a file is taken for a damaged photo, which preflight finds."""
DOORS: dict[str, Callable[[Path], object]] = {
    "a photo": photo_manifest,
    "a manifest": read_manifest,
    "a recipe": load,
    "an adapter": read_lora,
    "a base model": lambda path: load_base(str(path)),
    "a registry": lambda path: read_registry(path, "0" * 64),
    "a caption": captioned,
    "a foreign tar": foreign_tar,
    "a folder to import": lambda path: (from_kohya(path), from_imagefolder(path)),
    "a shard index": lambda path: Index.load(path.rename(INDEX_NAME).parent),
}
EXTENSIONS = """pt pth pkl pickle bin ckpt npy npz joblib pyd
    safetensors json jsonl png jpg webp yaml yml csv parquet tar"""


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("extension", EXTENSIONS.split())
def test_a_pickle_is_refused_at_every_door_under_every_name(door, extension):
    for number, content in enumerate(PICKLES):
        path = Path(f"{number}.{extension}")
        path.write_bytes(content)
        refuses(lambda path=path: DOORS[door](path.absolute()))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json", "mp_rank_00_model_states.pt"])
def test_a_pickle_in_a_checkpoint_is_passed_over(name):
    folder = Path("checkpoints/step-00000001")
    folder.mkdir(parents=True)
    for content in PICKLES:
        (folder / name).write_bytes(content)
        assert latest_checkpoint(Path("checkpoints"), Identity("r"))[0] is None


def test_a_pickle_in_a_prior_store_is_named_and_not_opened():
    (folder := Path("store/x/latents")).mkdir(parents=True)
    for content in PICKLES:
        for name in ("x/key.json", "x/latents/a.json", "x/latents/a.safetensors"):
            Path("store", name).write_bytes(content)
        assert len(store_damage(Path("store"))) == 2
    made = kept_tensor(folder, {}, lambda: torch.ones(2))
    assert torch.equal(made, torch.ones(2))


def shard_of(members: list[tuple[str, bytes]], key: str = "cat-0-0") -> Path:
    """A shard folder with every digest right, whatever its members are."""
    import hashlib

    folder, body = Path("shards"), b""
    folder.mkdir(exist_ok=True)
    for name, content in members:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        body += info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
    whole = body + bytes(TAR_END)
    row = Entry("train-000000.tar", key, 0, len(body), hashlib.sha256(body).hexdigest(), "")
    shard = Shard("train-000000.tar", hashlib.sha256(whole).hexdigest(), len(whole), 1)
    (folder / shard.name).write_bytes(whole)
    Index((row,), (shard,)).save(folder)
    return folder


META = json.dumps({"caption": "", "subject": "cat", "role": 0, "size": 4}).encode()
MEMBERS = {
    **{f".{ext}": [(f"cat-0-0.{ext}", PICKLES[1]), ("cat-0-0.json", META)] for ext in EXTENSIONS.split()[:10]},
    "a dotted key": [("cat-0-0.v1.png", b"abcd"), ("cat-0-0.v1.json", META)],
    "up and away": [("../cat-0-0.png", b"abcd"), ("../cat-0-0.json", META)],
    "absolute": [("/tmp/cat-0-0.png", b"abcd"), ("/tmp/cat-0-0.json", META)],
    "interleaved": [("cat-0-0.png", b"abcd"), ("cat-0-1.png", b"abcd"), ("cat-0-0.json", META)],
    "twice": [("cat-0-0.png", b"abcd"), ("cat-0-0.png", b"efgh"), ("cat-0-0.json", META)],
    "no provenance": [("cat-0-0.png", b"abcd")],
    "two images": [("cat-0-0.png", b"abcd"), ("cat-0-0.jpg", b"abcd"), ("cat-0-0.json", META)],
    "provenance of another size": [("cat-0-0.png", b"abcde"), ("cat-0-0.json", META)],
    "provenance that is a pickle": [("cat-0-0.png", b"abcd"), ("cat-0-0.json", PICKLES[0])],
    "provenance nested deep": [("cat-0-0.png", b"abcd"), ("cat-0-0.json", b"[" * 100_000)],
    "provenance without a width": [("cat-0-0.png", b"abcd"), ("cat-0-0.json", META[:-1] + b', "width": "0"}')],
    "provenance of no width": [("cat-0-0.png", b"abcd"), ("cat-0-0.json", META[:-1] + b', "height": 0}')],
    "another subject": [("cat-0-0.png", b"abcd"), ("cat-0-0.json", META.replace(b"cat", b"dog"))],
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_hostile_shard_with_right_digests_is_refused(name):
    folder = shard_of(MEMBERS[name])
    refuses(lambda: list(read_samples(folder, Index.load(folder).entries)))
    assert verify(folder)


def test_the_same_shard_with_honest_members_is_read():
    folder = shard_of([("cat-0-0.png", b"abcd"), ("cat-0-0.json", META)])
    assert [one.image for one in read_samples(folder, Index.load(folder).entries)] == [b"abcd"]


IDS = ["../x", "a/b", "a\\b", ".", "..", "-x", "_x", "x" * 65, "a b", "a\tb", "é", "a;b", "$(x)", "`x`", "<b>", "a:b",
       "a.b", "~", "%2e", "a*", "a\x00b", "\u202ea", "A\u0301"]  # fmt: skip


@pytest.mark.parametrize("name", IDS)
def test_ids_that_are_no_plain_names_are_refused(name):
    Path("p").mkdir()
    Image.new("RGB", (32, 32)).save("p/1.png")
    Path("m.jsonl").write_text(json.dumps({"subject": name, "class": "cat", "images": "p"}))
    assert "column subject" in refuses(lambda: read_manifest(Path("m.jsonl")))


YAMLS = {
    "object": "!!python/object/apply:os.system ['touch canary']",
    "module": "x: !!python/module:os",
    "new": "!!python/object/new:os.system ['touch canary']",
    "name": "x: !!python/name:os.system",
    "own tag": "x: !shell touch canary",
    "aliases": "a: &a [1,1,1,1]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n"
                                            for i in range(20)),
    "merge": "a: &a {b: 1}\nc:\n  <<: *a",
    "deep": "[" * 5000 + "]" * 5000,
    "deep mappings": "".join(f"{' ' * i}a:\n" for i in range(3000)),
    "twice": "- {subject: a, subject: b}",
    "binary": "x: !!binary aGk=",
    "documents": "a: 1\n---\nb: 2",
    "not text": "\x00\x01",
    "whole number without end": "seed: " + "9" * 100_000,
    "set": "!!set {a, b}",
}  # fmt: skip


@pytest.mark.parametrize("name", YAMLS)
def test_hostile_yaml_is_refused_as_recipe_and_as_manifest(name):
    refuses(lambda: loads(YAMLS[name]))
    Path("m.yaml").write_text(YAMLS[name])
    refuses(lambda: read_manifest(Path("m.yaml")))


def header(length: int, text: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text


def claims(**entry) -> bytes:
    text = json.dumps({"unet.x.lora_A.weight": entry}).encode()
    return header(len(text), text) + bytes(64)


HEADERS = {
    "empty": b"",
    "of 2^60 bytes": header(2**60),
    "of 2^64 - 1 bytes": header(2**64 - 1),
    "of 90 MB that are not there": header(90 * 2**20, b"{"),
    "of 200 MB": header(200 * 2**20, b"{" + b" " * 1000),
    "no JSON": header(8, b"\xff" * 8),
    "nested deep": header(50_000, b"[" * 50_000),
    "beyond the end": claims(dtype="F32", shape=[1000, 1000], data_offsets=[0, 4_000_000]),
    "backwards": claims(dtype="F32", shape=[2], data_offsets=[8, 0]),
    "negative": claims(dtype="F32", shape=[-2], data_offsets=[0, 8]),
    "overflowing": claims(dtype="F32", shape=[2**33, 2**33], data_offsets=[0, 8]),
    "another size": claims(dtype="F32", shape=[3], data_offsets=[0, 64]),
    "no type": claims(dtype="PY", shape=[2], data_offsets=[0, 8]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_bad_safetensors_header_is_refused_without_its_memory(name):
    import resource

    Path("a.safetensors").write_bytes(HEADERS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(lambda: read_lora(Path("a.safetensors")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


A, B = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "lora_B"
FOREIGN = {
    "a layer that is not there": {"unet.nowhere.lora_A.weight": (2, 8), "unet.nowhere.lora_B.weight": (8, 2)},
    "a component that is not there": {"vae.x.lora_A.weight": (2, 8), "vae.x.lora_B.weight": (8, 2)},
    "a part of Python": {"unet.__class__.lora_A.weight": (2, 8), "unet.__class__.lora_B.weight": (8, 2)},
    "another width": {A: (2, 7), A.replace("lora_A", B): (9, 2)},
    "ranks that differ": {A: (2, 32), A.replace("lora_A", B): (32, 3)},
    "no second matrix": {A: (2, 32)},
    "no dot": {"x.lora_A.weight": (2, 8), "x.lora_B.weight": (8, 2)},
    "no adapter": {"unet.conv_in.weight": (2, 2)},
}


@pytest.fixture(scope="module")
def base():
    return load_models(FAMILIES["sd"], ModelConfig(path=str(sd_folder())))


@pytest.mark.parametrize("name", FOREIGN)
def test_an_adapter_with_other_names_or_shapes_is_refused(name, base):
    save_file({key: torch.zeros(shape) for key, shape in FOREIGN[name].items()}, "a.safetensors")

    def use():
        with adapter(FAMILIES["sd"], base, read_lora(Path("a.safetensors"))[0]):
            pytest.fail("was put on the base")

    refuses(use)
    assert not any("base" in path.split(".") for path, _ in base.denoiser.named_modules())


@pytest.mark.parametrize("metadata", ["[1]", "{", "null", '{"unet.lora_alpha": "x"}', "[" * 5000])
def test_hostile_adapter_metadata_is_refused(metadata):
    shapes = {A: torch.zeros(2, 32), A.replace("lora_A", B): torch.zeros(32, 2)}
    Path("a.safetensors").write_bytes(save(shapes, {"lora_adapter_metadata": metadata}))
    refuses(lambda: read_lora(Path("a.safetensors")))


def test_a_base_model_may_not_name_other_code():
    import shutil

    for entry in (["os", "system"], ["diffusers", "AudioDiffusionPipeline"], ["evil", "Model"]):
        shutil.rmtree("model", ignore_errors=True)
        shutil.copytree(sd_folder(), "model")
        index = json.loads(Path("model/model_index.json").read_text())
        Path("model/model_index.json").write_text(json.dumps({**index, "unet": entry}))
        refuses(lambda: load_base("model"))
    shutil.rmtree("model")
    shutil.copytree(sd_folder(), "model")
    for file in Path("model").rglob("*.safetensors"):
        file.with_name("diffusion_pytorch_model.bin").write_bytes(PICKLES[1])
        file.with_name("pytorch_model.bin").write_bytes(PICKLES[1])
        file.unlink()
    refuses(lambda: load_base("model"))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    """A PNG whose header claims a size, with other chunks and hardly any data."""
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + b"".join(more) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")


PHOTOS = {
    "a bomb": png_of(65_535, 65_535),
    "a bomb just above the cap": png_of(20_000, 10_001),
    "a size of nothing": png_of(0, 0),
    "a text bomb": png_of(32, 32, png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80 * 2**20), 9))),
    "a profile bomb": png_of(32, 32, png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(80 * 2**20), 9))),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "HTML": b"<html><script>alert(1)</script></html>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch canary) (w) file\n",
    "PDF": b"%PDF-1.4\n",
    "a script": b"#!/bin/sh\ntouch canary\n",
    "a HEIC of nothing": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "an AVIF of nothing": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(200),
    "a HEIC that claims to go on": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\x7f\xff\xff\xffmeta" + bytes(64),
    "PPM": b"P6 40 40 255 " + bytes(4800),
    "XBM": b"#define im_width 40\n#define im_height 40\nstatic char im_bits[] = {\n" + b"0x00," * 200,
}


@pytest.mark.parametrize("name", PHOTOS)
def test_hostile_photos_are_refused(name):
    Path("p.png").write_bytes(PHOTOS[name])
    assert "p.png" in refuses(lambda: open_photo(Path("p.png")))


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "/proc/self/environ", "/", "missing"])
def test_a_link_under_a_photos_name_gives_nothing_away(target):
    Path("p.png").symlink_to(target)
    message = refuses(lambda: photo_manifest(Path("p.png")))
    assert "root:x:0:0" not in message and "PATH=" not in message


def test_a_pipe_under_a_photos_name_is_not_waited_for():
    os.mkfifo("p.png")
    refuses(lambda: photo_manifest(Path("p.png")))
