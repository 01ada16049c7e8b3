"""Divisions by 1.0 are gone from a U-Net, and nothing else of it."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbtrain.engines.capture import compile_regions
from dbtrain.engines.unit_scale import One, drop_unit_divisions
from dbtrain.families import FAMILIES
from dbtrain.models.architectures import class_of
from dbtrain.models.load import load_models
from dbtrain.settings.config import ModelConfig


class Divisions(TorchDispatchMode):
    """Counts divisions by the number 1."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "aten.div" in str(func) and not isinstance(args[1], torch.Tensor) and args[1] == 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def denoiser(sd_folder):
    """As diffusers makes it."""
    return class_of("diffusers:UNet2DConditionModel").from_pretrained(sd_folder / "unet")


def trained(denoiser, divisions=None):
    """Prediction, and a gradient, of fixed inputs. divisions: counts inside."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator).requires_grad_()
    told = torch.randn(2, 7, denoiser.config.cross_attention_dim, generator=generator)
    with divisions or nullcontext():
        output = denoiser(x, torch.tensor([10, 700]), told).sample
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
    return output, gradient


def test_the_same_bits_without_a_division(denoiser):
    without = copy.deepcopy(denoiser)
    dropped = drop_unit_divisions(without)
    before, after = Divisions(), Divisions()
    want, got = trained(denoiser, before), trained(without, after)
    assert all(torch.equal(one, other) for one, other in zip(got, want))
    assert dropped > 0 and before.count >= 2 * dropped and after.count == before.count - 2 * dropped
    assert drop_unit_divisions(without) == 0


def test_other_divisors_stay(denoiser):
    scaled = copy.deepcopy(denoiser)
    block = next(module for module in scaled.modules() if hasattr(module, "output_scale_factor"))
    block.output_scale_factor = 2.0
    drop_unit_divisions(scaled)
    assert block.output_scale_factor == 2.0
    assert not torch.equal(trained(scaled)[0], trained(denoiser)[0])


def test_blocks_compile_without_a_graph_break(denoiser):
    without = copy.deepcopy(denoiser)
    drop_unit_divisions(without)
    want = trained(without)[0]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_regions(without, "eager")
    assert torch.equal(trained(without)[0], want)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_loaded_base_divides_by_nothing(sd_folder):
    loaded = load_models(FAMILIES["sd"], ModelConfig(path=str(sd_folder))).denoiser
    assert drop_unit_divisions(loaded) == 0


def test_it_is_a_one_to_whoever_looks():
    assert One() == 1.0 and repr(One()) == "1.0" and copy.copy(One()) == One() and 6.5 / One() == 6.5
