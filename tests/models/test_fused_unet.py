"""U-Net blocks with fused norms: the same numbers in both layouts, and pictures that stay in theirs."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention

from dbtrain.bench.operators import Operators
from dbtrain.models import fused_unet
from dbtrain.models.adapters import attach
from dbtrain.models.fused_unet import (
    BasicTransformerBlock,
    GroupNorm,
    ResnetBlock2D,
    Transformer2DModel,
    added_and_normed,
    fuse_unet,
)
from dbtrain_kernels import reference

EXACT = 1e-12
FORMS = {
    "convolutions": {},
    "linear": {"use_linear_projection": True},
    "IF": {"resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": True,
           "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
           "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D")},
}  # fmt: skip


def unet(**options):
    torch.manual_seed(0)
    sizes = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "attention_head_dim": 8,
        "norm_num_groups": 8, "cross_attention_dim": 12, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    model = UNet2DConditionModel(**sizes | options).double().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight), torch.nn.init.normal_(module.bias)
    return model


def far(got, want):
    return max((one - other).norm().item() / other.norm().item() for one, other in zip(got, want, strict=True))


class Copies(Operators):
    """Counts copies of pictures to another layout."""

    pictures = 0

    def saw(self, func, name, args, kwargs, result, kernels):
        if name == "clone" and result.dim() == 4 and result.shape[2] == result.shape[3]:
            self.pictures += 1


def results(model, targets=("to_q", "proj_in")):
    layers = attach(model, targets, 1, 2, 2.0)
    torch.manual_seed(1)
    params = [param for layer in layers for param in (layer.down_NRD, layer.up_NDR)]
    for param in params:
        param.data = torch.randn_like(param)
    x, told = (torch.randn(shape).to(model.device, model.dtype) for shape in ((2, 4, 8, 8), (2, 3, 12)))
    with Copies() as ran:
        output = model(x, torch.tensor([3, 600], device=model.device), told).sample
        gradients = torch.autograd.grad(output.square().sum(), params)
    return [output, *gradients], ran


@pytest.mark.parametrize("form", FORMS)
def test_numbers_names_and_parameters_are_the_same(form):
    plain = unet(**FORMS[form])
    fused, last = copy.deepcopy(plain), copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert fuse_unet(fused) == fuse_unet(last) > 10 and fuse_unet(fused) == 0
    assert [*fused.state_dict()] == [*plain.state_dict()]
    want, _ = results(plain)
    for model in (fused, last):
        assert far(results(model)[0], want) < EXACT


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fp32_is_float64_but_for_rounding_on_every_device(device, monkeypatch):
    """On a GPU by the kernels, between cuDNN's convolutions with channels last."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    want, _ = results(unet())
    fused = unet().float().to(device, memory_format=torch.channels_last)
    fuse_unet(fused)
    got, ran = results(fused)
    assert far([one.cpu().double() for one in got], want) < 1e-4
    assert (ran.names["group_norm"] > 10) == (device == "cuda") == (ran.names["residual_norm"] > 10)


def test_an_adapted_time_embedding_has_its_gradient(monkeypatch):
    """Our kernel gives it none, so it is added before."""

    def frozen(x, groups, weight, bias, eps, silu, shift_BC):
        assert shift_BC is None or not shift_BC.requires_grad
        return reference.group_norm(x, groups, weight, bias, eps, silu, shift_BC)

    monkeypatch.setattr(fused_unet, "group_norm", frozen)
    plain = unet()
    fused = copy.deepcopy(plain)
    fuse_unet(fused)
    assert far(results(fused, ["time_emb_proj"])[0], results(plain, ["time_emb_proj"])[0]) < EXACT


@pytest.mark.parametrize("form", ["convolutions", "linear"])
def test_channels_last_stay_last(form):
    """Nothing between two blocks copies a picture to another layout, in training mode either."""
    plain = unet(**FORMS[form]).to(memory_format=torch.channels_last).train()
    fused = copy.deepcopy(plain)
    fuse_unet(fused)
    seen = []

    def see(own, given, made):
        seen.append(made if torch.is_tensor(made) else made[0])

    for module in fused.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            module.register_forward_hook(see)
    (_, before), (_, after) = results(plain), results(fused)
    assert len(seen) == 12 and all(one.is_contiguous(memory_format=torch.channels_last) for one in seen)
    assert before.pictures > after.pictures == 0


def test_a_norm_that_trains_is_pytorchs(monkeypatch):
    """Our kernel has no gradient of weight and bias."""
    calls = []
    plain = reference.group_norm
    monkeypatch.setattr(fused_unet, "group_norm", lambda *args: calls.append(1) or plain(*args))
    norm, x = GroupNorm(2, 4), torch.randn(1, 4, 3, 3)
    norm(x, silu=True).sum().backward()
    assert norm.weight.grad is not None and not calls
    norm.requires_grad_(False)(x)
    assert calls
    norm.double()(x[0].double()[None].flatten(2)), norm.float()(x.bfloat16().float())
    assert len(calls) == 2


def blocks(model):
    return [module for module in model.modules() if isinstance(module, attention.BasicTransformerBlock)]


def test_each_addition_goes_with_the_norm_after_it():
    """As operators of the kernels, on tensors without numbers; the last addition of a block has no norm after it."""
    plain = unet().float().to("meta")
    fused = copy.deepcopy(plain)
    fuse_unet(fused)
    (_, before), (_, after) = results(plain), results(fused)
    count = len(blocks(fused))
    assert all(type(block) is BasicTransformerBlock for block in blocks(fused)) and count == 4
    assert before.names["native_layer_norm"] == 3 * count == after.names["residual_norm"]
    assert after.names["residual_norm_backward"] and not after.names["native_layer_norm"]
    assert after.names["add"] <= before.names["add"] - 2 * count - 2 * count  # forward, and of gradients


def test_arguments_that_a_block_here_does_not_know_go_to_diffusers(monkeypatch):
    (block,) = blocks(unet(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), mid_block_type=None,
                           up_block_types=("UpBlock2D", "UpBlock2D")))  # fmt: skip
    x, told = torch.randn(2, 6, 16).double(), torch.randn(2, 3, 12).double()
    want = block(x, encoder_hidden_states=told)
    block.__class__ = BasicTransformerBlock
    monkeypatch.setattr(fused_unet, "residual_norm", None)
    assert torch.equal(block(x, encoder_hidden_states=told, cross_attention_kwargs={"scale": None}), want)
    block.set_chunk_feed_forward(3, 1)
    assert torch.allclose(block(x, None, told), want, rtol=0, atol=1e-12)


def test_a_layer_norm_that_trains_or_has_another_dtype_is_pytorchs(monkeypatch):
    monkeypatch.setattr(fused_unet, "residual_norm", None)
    norm, x, y = torch.nn.LayerNorm(4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    total, normal = added_and_normed(norm, x, y)
    normal.sum().backward()
    assert torch.equal(total, x + y) and norm.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        total, normal = added_and_normed(norm.requires_grad_(False), x.bfloat16())
        assert torch.equal(total, x.bfloat16()) and torch.equal(normal, norm(total))
