"""Which form a denoiser is computed in: the settings decide, and deciding imports nothing."""

import subprocess
import sys

import pytest
import torch

from dbtrain.models.forms import fuse, fuses_pointwise, lay_out
from dbtrain.settings.config import EngineConfig


@pytest.mark.parametrize(
    "chosen, capture, device, fused",
    [
        ("auto", "auto", "cuda", True),
        ("auto", "compiled_graph", "cuda", False),
        ("auto", "auto", "cpu", False),
        ("on", "compile", "cpu", True),
        ("off", "auto", "cuda", False),
    ],
)
def test_the_setting_decides(chosen, capture, device, fused):
    assert fuses_pointwise(EngineConfig(fused_pointwise=chosen, capture=capture), device) == fused


@pytest.mark.parametrize(
    "chosen, kind, device, fused, last",
    [
        ("auto", "packed", "cuda", True, True),
        ("auto", "auto", "cuda", True, True),
        ("auto", "zero", "cuda", True, False),
        ("auto", "packed", "cuda", False, False),
        ("auto", "packed", "cpu", True, False),
        (True, "packed", "cpu", False, True),
        (False, "packed", "cuda", True, False),
    ],
)
def test_the_setting_decides_on_the_layout(chosen, kind, device, fused, last, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4)).requires_grad_(False)
    if fused:
        fuse(model, EngineConfig(fused_pointwise="on"), "cpu")
    weight = torch.nn.Parameter(torch.zeros(4, 2, 3, 3, device="meta"))  # stands for one on a GPU
    monkeypatch.setattr(type(weight), "device", property(lambda _: torch.device(device)), raising=False)
    assert lay_out(model, EngineConfig(channels_last=chosen, kind=kind)) == last
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) == last


def test_a_process_that_fuses_nothing_imports_no_model_of_diffusers():
    code = "import sys, dbtrain.training.session, dbtrain.bench.pack; print('diffusers.models' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
