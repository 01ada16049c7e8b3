"""Blocks whose norms take modulation and gated additions along."""

import copy

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock, ChromaTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4TransformerBlock
from diffusers.models.transformers.transformer_krea2 import Krea2TransformerBlock
from diffusers.models.transformers.transformer_lumina2 import Lumina2TransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

from dbtrain.bench.operators import Operators
from dbtrain.models import fused_modulation
from dbtrain.models.fused_modulation import BLOCKS, fuse_modulation, joined
from dbtrain_kernels.residual_norm import residual_norm

WIDE, TOKENS, CAPTIONS = 16, 5, 3


def tokens(count=TOKENS):
    return torch.randn(2, count, WIDE)


def flat(count):
    """A modulation of `count` parts."""
    return torch.randn(2, count * WIDE)


PLACES = torch.rand(TOKENS, 4)
ANGLES = tuple(one.repeat_interleave(2, 1) for one in (PLACES.cos(), PLACES.sin()))
HALVES = tuple(one.repeat(1, 2)[None] for one in (PLACES.cos(), PLACES.sin()))
COMPLEX = torch.polar(torch.ones(2, TOKENS, 4), torch.rand(2, TOKENS, 4))
ROWS = {
    "flux": (lambda: FluxTransformerBlock(WIDE, 2, 8), lambda: (tokens(), tokens(CAPTIONS), tokens(1)[:, 0]), 4),
    "flux single": (lambda: FluxSingleTransformerBlock(WIDE, 2, 8),
                    lambda: (tokens(), tokens(CAPTIONS), tokens(1)[:, 0]), 1),
    "chroma": (lambda: ChromaTransformerBlock(WIDE, 2, 8), lambda: (tokens(), tokens(CAPTIONS), tokens(12)), 4),
    "chroma single": (lambda: ChromaSingleTransformerBlock(WIDE, 2, 8), lambda: (tokens(), tokens(3)), 1),
    "flux2": (lambda: Flux2TransformerBlock(WIDE, 2, 8), lambda: (tokens(), tokens(CAPTIONS), flat(6), flat(6)), 4),
    "flux2 single": (lambda: Flux2SingleTransformerBlock(WIDE, 2, 8), lambda: (tokens(), None, flat(3)), 1),
    "qwen": (lambda: QwenImageTransformerBlock(WIDE, 2, 8),
             lambda: (tokens(), tokens(CAPTIONS), None, tokens(1)[:, 0]), 4),
    "sd3": (lambda: JointTransformerBlock(WIDE, 2, 8), lambda: (tokens(), tokens(CAPTIONS), tokens(1)[:, 0]), 4),
    "krea2": (lambda: Krea2TransformerBlock(WIDE, 32, 2, 1, 1e-5), lambda: (tokens(), tokens(6).view(2, 1, -1), ANGLES),
              2),
    "zimage": (lambda: ZImageTransformerBlock(0, WIDE, 2, 2, 1e-5, True),
               lambda: (tokens(), None, COMPLEX, tokens(1)[:, 0]), 2),
    "zimage, no modulation": (lambda: ZImageTransformerBlock(0, WIDE, 2, 2, 1e-5, True, False),
                              lambda: (tokens(), None, COMPLEX), 2),
    "ideogram4": (lambda: Ideogram4TransformerBlock(WIDE, 32, 2, 1e-5, 8),
                  lambda: (tokens(), None, HALVES, tokens(1)[..., :8]), 2),
    "lumina2": (lambda: Lumina2TransformerBlock(WIDE, 2, 2, 8, None, 1e-5),
                lambda: (tokens(), None, COMPLEX, tokens(1)[:, 0]), 2),
    "lumina2, no modulation": (lambda: Lumina2TransformerBlock(WIDE, 2, 2, 8, None, 1e-5, False),
                               lambda: (tokens(), None, COMPLEX), 2),
}  # fmt: skip
"""A block of diffusers, its arguments, and the norms in it that take something along."""


def made(row):
    """(diffusers' block with weights unlike 1 and 0, ours, arguments), frozen."""
    torch.manual_seed(0)
    block, arguments, _ = ROWS[row]
    plain = block().requires_grad_(False)
    for param in plain.parameters():
        torch.nn.init.normal_(param, std=0.3)
    fused = copy.deepcopy(plain)
    assert fuse_modulation(fused) == 1 and fuse_modulation(fused) == 0
    assert [*fused.state_dict()] == [*plain.state_dict()] and type(fused).__name__ == type(plain).__name__
    return plain, fused, arguments()


def differentiated(block, arguments):
    """The outputs and the gradients of all tokens and modulations."""
    given = [one.clone().requires_grad_() if floating(one) else one for one in arguments]
    outputs = block(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(sum(one.square().sum() for one in outputs), [*filter(floating, given)])]


def floating(value):
    return torch.is_tensor(value) and value.is_floating_point()


def test_every_block_has_a_row():
    assert {type(block()) for block, _, _ in ROWS.values()} == {*BLOCKS}


@pytest.mark.parametrize("row", ROWS)
def test_outputs_and_all_gradients_are_those_of_diffusers(row, monkeypatch):
    """In fp32, the modulation's gradient among them; `test_family.py` compares whole models in float64."""
    calls = []
    monkeypatch.setattr(fused_modulation, "residual_norm", lambda *args: calls.append(args) or residual_norm(*args))
    plain, fused, arguments = made(row)
    want, got = differentiated(plain, arguments), differentiated(fused, arguments)
    assert len(calls) == ROWS[row][2]
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("row", ROWS)
def test_norms_and_additions_are_kernels_of_ours(row):
    """On the meta device, where a kernel is as on a GPU; tokens have gradients, and modulations none."""
    _, fused, arguments = made(row)
    moved = [one.to("meta") if torch.is_tensor(one) else one for one in arguments]
    moved = [tuple(part.to("meta") for part in one) if isinstance(one, tuple) else one for one in moved]
    moved[0].requires_grad_()
    with Operators() as ran:
        outputs = fused.to("meta")(*moved)
        torch.autograd.grad(sum(one.sum() for one in (outputs if isinstance(outputs, tuple) else (outputs,))), moved[0])
    assert ran.names["residual_norm"] == ROWS[row][2] and not ran.names["native_layer_norm"]
    assert 0 < ran.names["residual_norm_backward"] <= ROWS[row][2]


def test_another_modulation_for_each_token_is_diffusers(monkeypatch):
    """Such as that of Qwen-Image's edited pictures, of Z-Image's clean tokens, and an adapter of FLUX.1's pictures."""
    monkeypatch.setattr(fused_modulation, "residual_norm", None)
    _, block, (x, _, places, told) = made("zimage")
    mask = torch.tensor([[1, 1, 0, 0, 1]] * 2)
    assert block(x, None, places, None, mask, told, told + 1).shape == x.shape
    _, block, (x, c, _, told) = made("qwen")
    block.zero_cond_t = True
    two = block(x, c, None, torch.cat([told, told]), modulate_index=torch.tensor([[0, 1, 0, 1, 1]] * 2))
    assert two[1].shape == x.shape


def test_parts_of_one_tensor_are_joined_without_a_copy():
    whole = torch.randn(2, 8, 4, requires_grad=True) * 1.0
    captions, pictures = whole[:, :3], whole[:, 3:]
    assert joined(captions, pictures) is whole
    copied, fewer, others = (captions, pictures.clone()), (captions, whole[:, 4:]), (whole[:, :2], pictures)
    for parts in ((pictures, captions), copied, fewer, others):
        assert torch.equal(joined(*parts), torch.cat(parts, 1))


def test_other_models_and_the_library_stay():
    plain = FluxTransformerBlock(WIDE, 2, 8)
    fuse_modulation(FluxTransformerBlock(WIDE, 2, 8))
    assert type(plain) is FluxTransformerBlock and FluxTransformerBlock.__module__.startswith("diffusers")
