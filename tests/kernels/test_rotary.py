"""RMSNorm with rotary embedding: the forms of diffusers' families, and views."""

from functools import partial

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case
from dbtrain_kernels.rotary import inputs, rotary
from tests.kit.operations import on


def cases():
    """Pairs that are neighbours and halves, widths that are no power of 2, more heads than a program takes, bf16."""
    calls = {
        "plain": {},
        "halves": {"shape": (2, 3, 2, 12), "halves": True, "each": True},
        "many heads": {"shape": (1, 2, 11, 6), "each": True},
        "bf16": {"shape": (2, 3, 9, 16), "dtype": torch.bfloat16},
    }
    return [Case(name, partial(inputs, **call), call.get("dtype", torch.float32)) for name, call in calls.items()]


def test_it_is_diffusers_norm_and_embedding_in_each_form():
    x, norm = torch.randn(2, 5, 3, 8), torch.nn.RMSNorm(8, 1e-6)
    torch.nn.init.normal_(norm.weight)
    given, place = (norm(x), norm.weight.detach()), torch.arange(5)
    real = get_1d_rotary_pos_embed(8, place, use_real=True)
    cos, sin = (table[None, :, ::2] for table in real)
    halves = get_1d_rotary_pos_embed(8, place, use_real=True, repeat_interleave_real=False)
    whole = get_1d_rotary_pos_embed(8, place)[None].expand(2, -1, -1)
    parts = torch.view_as_real(whole).unbind(-1)
    for want, angles, other in (
        (apply_rotary_emb(given[0], real, sequence_dim=1), (cos, sin), False),
        (apply_rotary_emb(given[0], halves, use_real_unbind_dim=-2, sequence_dim=1), (cos, sin), True),
        (apply_rotary_emb(given[0], whole, use_real=False), parts, False),
    ):
        assert torch.allclose(reference.rotary(x, given[1], *angles, 1e-6, other), want, rtol=1e-6, atol=1e-6)


def test_a_part_of_a_projection_is_read_where_it_lies():
    """Queries that are a view among keys and values, and angles that are every second number of a table."""
    given = on("cpu", inputs((2, 5, 3, 8)))
    wide = torch.randn(2, 5, 72)
    wide[..., 24:48] = given["x"].flatten(2)
    table = torch.randn(2, 1, 5, 8)
    table[0, ..., ::2], table[1, ..., ::2] = given["cos"], given["sin"]
    view = {**given, "x": wide[..., 24:48].unflatten(-1, (3, 8)), "cos": table[0, ..., ::2], "sin": table[1, ..., ::2]}
    assert torch.equal(rotary(**view), rotary(**given))
