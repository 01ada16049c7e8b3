"""Checkpoints of record: whole or absent, verified before anything is parsed, never a foreign one."""

import json
import random
import shutil

import pytest
import torch

from dbtrain.errors import DataError
from dbtrain.results import checkpoint as module
from dbtrain.results.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from dbtrain.results.identity import Identity

RUN = "a" * 64


def make(step: int, run: str = RUN) -> Checkpoint:
    torch.manual_seed(step)
    names = ("unet.a/b.weight", "unet.c", "scalar")
    shapes = ((3, 4), (5,), ())
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema")
    return Checkpoint(step, run, {k: {n: torch.randn(s) for n, s in zip(names, shapes)} for k in kinds})


@pytest.fixture
def root(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, make(step), keep=5)
    return tmp_path


def test_a_checkpoint_comes_back_to_the_bit(root):
    folder, notes = latest_checkpoint(root, Identity(RUN))
    found = read_checkpoint(folder)
    assert (folder.name, found.step, found.run, notes) == ("step-00000002", 2, RUN, [])
    want = make(2).state
    assert found.state.keys() == want.keys()
    for kind, tensors in want.items():
        assert found.state[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found.state[kind][name], tensor)
            assert found.state[kind][name].dtype == tensor.dtype


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "none", Identity(RUN)) == (None, [])


def forbid_parsing(monkeypatch):
    def fail(folder):
        raise AssertionError(f"{folder} was parsed")

    monkeypatch.setattr(module, "read_checkpoint", fail)


def test_every_flipped_bit_is_detected_before_anything_is_parsed(root, monkeypatch):
    forbid_parsing(monkeypatch)
    shutil.rmtree(root / "step-00000001")
    folder, draw, flips = root / "step-00000002", random.Random(0), 0
    for path in sorted(folder.iterdir()):
        sound = path.read_bytes()
        for bit in draw.sample(range(8 * len(sound)), min(200, 8 * len(sound))):
            bad = bytearray(sound)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            found, notes = latest_checkpoint(root, Identity(RUN))
            assert found is None and len(notes) == 1, (path.name, bit)
            flips += 1
        path.write_bytes(sound)
    assert flips == 600
    assert verify_checkpoint(folder) is None


def test_every_truncation_is_detected(root, monkeypatch):
    forbid_parsing(monkeypatch)
    shutil.rmtree(root / "step-00000001")
    for path in sorted((root / "step-00000002").iterdir()):
        sound = path.read_bytes()
        for size in {0, 1, len(sound) // 2, len(sound) - 1, *random.Random(1).sample(range(len(sound)), 30)}:
            path.write_bytes(sound[:size])
            assert latest_checkpoint(root, Identity(RUN))[0] is None, (path.name, size)
        path.write_bytes(sound)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "swapped", "folder", "garbage"])
def test_the_newest_that_verifies_is_taken_with_a_word_about_the_others(root, name, harm):
    path = root / "step-00000002" / name
    sound = path.read_bytes()
    path.unlink()
    if harm == "swapped":
        other = root / "step-00000001" / ("state.json" if name != "state.json" else "manifest.json")
        path.write_bytes(other.read_bytes())
    elif harm == "folder":
        path.mkdir()
    elif harm == "garbage":
        path.write_bytes(bytes(random.Random(2).randbytes(len(sound))))
    found, (note,) = latest_checkpoint(root, Identity(RUN))
    assert found.name == "step-00000001"
    assert "step-00000002" in note and "falling back" in note


@pytest.mark.parametrize(
    "text", ["[]", "null", '"x"', "{}", '{"state.json": 1, "state.safetensors": null}', "[" * 5000]
)
def test_a_manifest_of_another_shape_is_a_defect(root, text):
    (root / "step-00000002" / "manifest.json").write_text(text)
    assert latest_checkpoint(root, Identity(RUN))[0].name == "step-00000001"


def test_a_number_in_the_name_is_not_believed(root):
    """A sound checkpoint under another step's name: what it says of itself holds."""
    shutil.copytree(root / "step-00000001", root / "step-00000007")
    found = read_checkpoint(latest_checkpoint(root, Identity(RUN))[0])
    assert found.step in (1, 2)
    assert torch.equal(found.state["master"]["unet.c"], make(found.step).state["master"]["unet.c"])


def test_other_names_are_no_checkpoints(root):
    for name in ("step-3", "step-000000030", "latest", ".step-00000009.00000000.tmp", "xstep-00000009"):
        shutil.copytree(root / "step-00000001", root / name)
    (root / "step-00000009").write_text("a file")
    found, notes = latest_checkpoint(root, Identity(RUN))
    assert found.name == "step-00000002"
    assert len(notes) == 1


def test_a_foreign_run_is_refused(root):
    with pytest.raises(DataError, match="other settings or data .*use another --out"):
        latest_checkpoint(root, Identity("b" * 64))


def test_retention_keeps_the_newest_good_ones(root):
    save_checkpoint(root, make(3), keep=2)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
    (root / "step-00000003" / "state.json").write_text("{}")
    save_checkpoint(root, make(4), keep=2)
    names = {path.name for path in root.iterdir()}
    assert {"step-00000002", "step-00000004"} <= names
    assert latest_checkpoint(root, Identity(RUN))[0].name == "step-00000004"


def test_what_a_killed_writer_left_is_no_obstacle(root):
    remains = root / ".step-00000003.00000000.tmp"
    remains.mkdir()
    (remains / "state.safetensors").write_bytes(b"half")
    assert latest_checkpoint(root, Identity(RUN))[0].name == "step-00000002"
    assert save_checkpoint(root, make(3), keep=5).name == "step-00000003"
    assert not remains.exists()
    assert latest_checkpoint(root, Identity(RUN))[0].name == "step-00000003"


def test_writing_the_same_step_again_replaces_it(root):
    (root / "step-00000002" / "state.json").write_text("harm")
    save_checkpoint(root, make(2), keep=5)
    assert latest_checkpoint(root, Identity(RUN))[1] == []
    assert read_checkpoint(root / "step-00000002").step == 2
    assert json.loads((root / "step-00000002" / "manifest.json").read_text()).keys() == {
        "state.safetensors",
        "state.json",
    }


def test_a_full_disk_leaves_the_former_checkpoints(root, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(root, make(3), keep=1)
    assert latest_checkpoint(root, Identity(RUN))[0].name == "step-00000002"
