"""Gates and norms as one kernel each: the same numbers, names and parameters."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import LuminaFeedForward
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4MLP
from diffusers.models.transformers.transformer_krea2 import Krea2SwiGLU
from diffusers.models.transformers.transformer_z_image import FeedForward, ZImageTransformerBlock

from dbtrain.bench.operators import Operators
from dbtrain.models.adapters import attach
from dbtrain.models.fused_pointwise import Gate, Norm, fuse_pointwise

EXACT = 1e-12


def far(got, want):
    return max((one - other).norm().item() / other.norm().item() for one, other in zip(got, want, strict=True))


def test_a_real_unet_with_adapters_has_the_same_output_and_gradients():
    torch.manual_seed(0)
    plain = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=8, norm_num_groups=8,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).double()  # fmt: skip
    fused = copy.deepcopy(plain)
    assert fuse_pointwise(fused) == 4 + 21 + 12 and fuse_pointwise(fused) == 0  # gates, and norms of two kinds
    assert [*fused.state_dict()] == [*plain.state_dict()]
    results = []
    for model in (plain, fused):
        layers = attach(model, ["to_q", "ff.net.0.proj"], 1, 2, 2.0)
        torch.manual_seed(1)
        params = [param for layer in layers for param in (layer.down_NRD, layer.up_NDR)]
        for param in params:
            param.data = torch.randn_like(param)
        x, told = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 3, 12).double()
        output = model(x, torch.tensor([3, 600]), told).sample
        results.append([output, *torch.autograd.grad(output.square().sum(), params)])
    assert far(results[1], results[0]) < EXACT


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_diffusers_in_every_mix_of_dtypes(dtype, weight):
    """Against float64. In bf16 at most six roundings of 2^-9 follow one another: of the normalized input, its product
    with the weight, the cotangent, and their gradients."""
    torch.manual_seed(0)
    plain = RMSNorm(33, 1e-6)
    plain.weight.data += 0.1 * torch.randn(33)
    plain.to(weight)
    x = torch.randn(2, 5, 33, dtype=dtype)
    results = []
    for norm, given in ((copy.deepcopy(plain).double(), x.double()), (Norm(plain), x)):
        given.requires_grad_()
        output = norm(given)
        cotangent = torch.linspace(0.5, 2, 330, dtype=output.dtype).view(output.shape)
        results.append([one.double() for one in (output, *torch.autograd.grad(output, given, cotangent))])
    assert Norm(plain)(x).dtype == plain(x).dtype
    assert far(*results[::-1]) < (1e-6 if dtype == weight == torch.float32 else 6 * 2**-9)


def test_norms_of_a_transformer_are_one_kernel_each():
    block = ZImageTransformerBlock(0, 16, 2, 2, 1e-5, True)
    names = [*block.state_dict()]
    assert fuse_pointwise(block) == 6 + 1 + 1 + 1 and fuse_pointwise(block) == 0 and [*block.state_dict()] == names
    assert isinstance(block.ffn_norm1, Norm) and isinstance(block.feed_forward, FeedForward)
    assert not any(isinstance(module, RMSNorm | Gate) for module in block.modules())


LAYERS = {
    "Z-Image": lambda: FeedForward(8, 12),
    "Lumina-Image": lambda: LuminaFeedForward(8, 12, 4),
    "Ideogram 4": lambda: Ideogram4MLP(8, 12),
    "Krea 2": lambda: Krea2SwiGLU(8, 12),
    "FLUX.2": lambda: Flux2FeedForward(8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_swiglu_is_one_kernel_each_way_and_diffusers_numbers(name):
    plain = torch.nn.Sequential(LAYERS[name]()).requires_grad_(False)
    fused, x = copy.deepcopy(plain), torch.randn(2, 3, 8, requires_grad=True)
    assert fuse_pointwise(fused) == 1 and fuse_pointwise(fused) == 0 and [*fused.state_dict()] == [*plain.state_dict()]
    want, got = ((y, *torch.autograd.grad(y.square().sum(), x)) for y in (plain(x), fused(x)))
    assert far(got, want) < 1e-6
    with Operators() as ran:
        fused.to("meta")(torch.empty(2, 3, 8, device="meta", requires_grad=True)).sum().backward()
    assert ran.names["swiglu"] == ran.names["swiglu_backward"] == 1 and not ran.names["silu"]
