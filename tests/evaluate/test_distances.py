"""Distances by packages that a user may have: chosen, missing, broken. None of them is among the dependencies."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.errors import ConfigError
from dbtrain.evaluate.distances import PACKAGES, load_distance

BROKEN = {
    "an import of another make": "raise RuntimeError('operator torchvision::nms does not exist')",
    "no weights to be had": "def __getattr__(name): raise OSError('Name or service not known')",
}
LPIPS = """
import torch
class LPIPS(torch.nn.Module):
    def __init__(self, net, verbose):
        super().__init__()
    def forward(self, a, b):
        return (a - b).abs().mean((1, 2, 3), keepdim=True)
"""
DREAMSIM = """
import torch
def dreamsim(device, cache_dir):
    pixels = lambda image: torch.tensor([[sum(image.getpixel((0, 0)))]]).float()
    return (lambda a, b: (a - b).abs().flatten()), pixels
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that puts a package of this name and source where Python finds it, for this test alone."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, source):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)

    yield make
    for name in PACKAGES:
        sys.modules.pop(name, None)


def test_without_packages_it_is_the_patches():
    assert load_distance() == load_distance("patches") == (None, "")


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_a_package_that_does_not_work_is_told_or_refused_where_it_was_chosen(package, source):
    package("lpips", source)
    distance, note = load_distance("auto")
    assert distance is None and note.startswith("lpips does not work here (") and "patch distance instead" in note
    with pytest.raises(ConfigError, match="--distance: lpips does not work here"):
        load_distance("lpips")


@pytest.mark.parametrize("name, source, wanted", [
    ("lpips", LPIPS, [2 * 10 / 255, 2 * 30 / 255, 2 * 20 / 255]), ("dreamsim", DREAMSIM, [30, 90, 60])
])  # fmt: skip
def test_all_pairs_in_order(package, name, source, wanted):
    package(name, source)
    distance, note = load_distance(name)
    images = [Image.new("RGB", (8, 8), (grey,) * 3) for grey in (0, 10, 30)]
    found = distance.pairs(images)
    assert (note, found.dtype) == ("", torch.float64) and distance.name.lower().startswith(name)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert distance.pairs(images[:1]).shape == (0,)


def test_an_evaluation_beside_a_broken_package_is_made_and_says_so(trained, package, tmp_path):
    package("lpips", BROKEN["an import of another make"])
    shutil.copytree(trained, tmp_path / "out")
    words = ["evaluate", str(tmp_path / "out"), "--subject", "mug", "--class-images", "1", "--quiet", "--json"]
    told = CliRunner().invoke(cli.app, words)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert "torchvision::nms" in found["notes"][0] and found["encoders"]["distance"].startswith("patch distance of")
