"""A quantized base under an adapter: its numbers are those of the weights that it stands for."""

import importlib.util
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.models import quantize as module
from dbtrain.models.adapters import LoraWeights, StackedLora, refuse_misfit
from dbtrain.models.quantize import LIBRARIES, quantizable, quantize
from dbtrain.settings import recipes
from tests.kit.fake_family import fake_family

KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"no {library}"))
    for kind, library in LIBRARIES.items()
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.norm_in, self.small = nn.Linear(128, 64), nn.Linear(64, 64), nn.Linear(32, 64)

    def forward(self, x):
        return self.to_q(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj_in, self.blocks = nn.Linear(128, 128), nn.ModuleList([Block(), Block()])

    def forward(self, x):
        return self.blocks[0](self.proj_in(x))


FAMILY = replace(fake_family(encode_tokens=lambda *_: None, denoise=lambda *_: None), regions=("Block",))


def quantized(kind, dtype):
    net = Net().to(dtype).requires_grad_(False)
    whole = net.blocks[0].to_q.weight.clone()
    assert quantize(net, FAMILY, kind) == ["blocks.0.to_q", "blocks.1.to_q"]
    return net, whole


def numbers_of(layer):
    """What a quantized weight stands for."""
    if hasattr(layer.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.dequantize()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_an_adapter_on_a_quantized_layer_is_its_arithmetic(kind, dtype, tolerance):
    """y = W' x + b + s B A x and its gradients, W' being the weight that the bits stand for. The tolerance is the
    rounding of sums over 128 products: 128 * 2^-24 in float32, and some of 2^-9 in bfloat16."""
    net, whole = quantized(kind, dtype)
    base = net.blocks[0].to_q
    weight = numbers_of(base).to(dtype)
    layer = StackedLora(base, 3, 4, 0.5)
    assert (layer.in_features, layer.out_features, tuple(layer.down_NRD.shape)) == (128, 64, (3, 4, 128))
    torch.manual_seed(1)
    layer.down_NRD.data.normal_(std=0.1)
    layer.up_NDR.data.normal_(std=0.1)
    x = torch.randn(6, 5, 128, dtype=dtype, requires_grad=True)
    layer(x).square().sum().backward()
    got = x.grad, layer.down_NRD.grad, layer.up_NDR.grad
    x2 = x.detach().double().requires_grad_()
    down, up = (matrix.detach().double().requires_grad_() for matrix in (layer.down_NRD, layer.up_NDR))
    update = 0.5 * torch.einsum("nod,nbtd->nbto", up, torch.einsum("ndi,nbti->nbtd", down, x2.view(3, 2, 5, 128)))
    want = F.linear(x2, weight.double(), base.bias.double()) + update.reshape(6, 5, 64)
    want.square().sum().backward()
    assert (layer(x).double() - want).abs().max() / want.abs().max() < tolerance
    for one, other in zip(got, (x2.grad, down.grad, up.grad), strict=True):
        assert (one.double() - other).abs().max() / other.abs().max() < tolerance
    error = (weight.double() - whole.double()).abs().max() / whole.double().abs().max()
    assert 0 < error < {"int8": 0.01, "fp8": 0.07, "nf4": 0.25}[kind], "the bits stand for the weight"


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_quantized_base_is_as_it_was_and_an_adapter_fits(kind):
    net, _ = quantized(kind, torch.float32)
    plain = Net()
    assert torch.equal(net.proj_in.weight, plain.proj_in.weight)
    assert torch.equal(net.blocks[0].norm_in.weight, plain.blocks[0].norm_in.weight)
    down, up = torch.zeros(2, 128), torch.zeros(64, 2)
    refuse_misfit({"unet": net}, LoraWeights({"unet": {"blocks.0.to_q": (down, up)}}, 2.0, 2))


def test_none_does_nothing_and_what_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    net = Net()
    assert quantize(net, FAMILY, "none") == [] and type(net.blocks[0].to_q) is nn.Linear
    with pytest.raises(ConfigError, match="Linear has no layer to quantize"):
        quantize(nn.Linear(64, 64), FAMILY, "int8")

    def broken(*_):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setitem(module.MAKERS, "torchao", broken)
    with pytest.raises(ConfigError, match="torchao cannot make int8 here: no kernel image$"):
        quantize(Net(), FAMILY, "int8")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"nf4 needs bitsandbytes; pip install 'dbtrain\[quantize\]'"):
        quantize(Net(), FAMILY, "nf4")


def test_it_needs_a_pack():
    with pytest.raises(ConfigError, match="model.quantize.*: needs engine.kind=packed"):
        recipes.load(None, ["model.quantize=int8", "engine.kind=zero"])
    assert recipes.load(None, ["model.quantize=int8", "engine.kind=packed"])


@pytest.mark.parametrize("name", FAMILIES)
def test_published_shapes_have_their_weight_in_layers_that_are_quantized(name):
    for shape in FAMILIES[name].shapes.values():
        model = shape.blank("meta")
        chosen = set(quantizable(model, FAMILIES[name]))
        if name in ("if_stage1", "if_stage2"):
            assert not chosen  # convolutions, and attention outside of blocks that repeat: refused in one line
            continue
        linear = {path: layer.weight.numel() for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        share = sum(linear[path] for path in chosen) / sum(param.numel() for param in model.parameters())
        assert share > (0.25 if FAMILIES[name].denoiser == "unet" else 0.45), share
        assert not any("norm" in path.rsplit(".", 1)[-1] or "embed" in path for path in chosen)
