"""Norm and rotary embedding as one kernel: in one model alone, by every way that places are told."""

import copy

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

from dbtrain.models import fused_rotary
from dbtrain.models.attention import Ran, _engage_backend
from dbtrain.models.fused_rotary import fuse_rotary, turning

TOKENS = {"captions": 3, "pictures": 5}


def attention(joint=True):
    torch.manual_seed(0)
    added = {"added_kv_proj_dim": 16, "context_pre_only": False} if joint else {}
    layer = FluxAttention(16, 2, 8, bias=True, out_dim=16, eps=1e-6, **added).requires_grad_(False)
    for name, param in layer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(param)
    return layer


def places():
    angle = torch.rand(sum(TOKENS.values()), 4).repeat_interleave(2, 1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
def test_captions_are_the_first_tokens_and_pictures_the_last(joint, by_name, device):
    plain = attention(joint).to(device)
    fused = copy.deepcopy(plain)
    assert fuse_rotary(fused) == 1 and fuse_rotary(fused) == 0
    captions, pictures = (torch.randn(2, count, 16).to(device) for count in TOKENS.values())
    tables = tuple(table.to(device) for table in places())
    given = (pictures, captions) if joint else (torch.cat([captions, pictures], 1), None)
    rest = {"image_rotary_emb": tables} if by_name else {}
    positional = () if by_name else (None, tables)
    want, got = (layer.processor(layer, *given, *positional, **rest) for layer in (plain, fused))
    for one, other in zip(got if joint else [got], want if joint else [want], strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    unturned = plain.processor(plain, *given)
    assert not torch.allclose((unturned if joint else [unturned])[0], (want if joint else [want])[0], atol=1e-3)


def test_other_models_and_the_library_stay(monkeypatch):
    calls, plain = [], attention()
    fuse_rotary(attention())
    monkeypatch.setattr(fused_rotary, "rotary", lambda *args: calls.append(args))
    plain(torch.randn(1, 5, 16), torch.randn(1, 3, 16), image_rotary_emb=places())
    assert not calls and type(plain.processor) is FluxAttnProcessor
    assert transformer_flux.apply_rotary_emb.__module__.startswith("diffusers")


def test_without_places_and_with_a_norm_that_trains_it_is_diffusers(monkeypatch):
    def never(*args):
        raise AssertionError

    monkeypatch.setattr(fused_rotary, "rotary", never)
    layer = attention(joint=False)
    fuse_rotary(layer)
    layer(torch.randn(1, 8, 16))
    layer.norm_k.weight.requires_grad_(True)
    layer(torch.randn(1, 8, 16), image_rotary_emb=places()).sum().backward()
    assert layer.norm_k.weight.grad is not None


def test_a_backend_of_attention_goes_on_top():
    layer = attention()
    fuse_rotary(layer)
    engaged = _engage_backend(layer, "math", "cpu", torch.float32)
    assert isinstance(layer.processor, turning(FluxAttnProcessor))
    with Ran() as ran, engaged.watched():
        layer(torch.randn(1, 5, 16), torch.randn(1, 3, 16), image_rotary_emb=places())
    assert ran.kernels == {"math"}


def test_a_block_is_traced_without_a_break():
    block = ZImageTransformerBlock(0, 16, 2, 2, 1e-5, True).requires_grad_(False)
    fuse_rotary(block)
    x, angles, told = torch.randn(1, 5, 16), torch.polar(torch.ones(1, 5, 4), torch.rand(1, 5, 4)), torch.randn(1, 16)
    want = block(x, None, angles, told)
    traced = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.allclose(traced(x, None, angles, told), want, atol=1e-6)
