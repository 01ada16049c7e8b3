"""FLUX.1's kohya names: diffusers' converter of such files is the independent reader."""

import pytest
import torch
from diffusers import FluxPipeline

from dbtrain.errors import ConfigError
from dbtrain.families.flux_names import kohya
from dbtrain.models.adapter_names import to_kohya
from dbtrain.models.adapters import LoraWeights

WIDTH, MLP, RANK = 3072, 12288, 2
"""The converter knows the widths of the published model alone."""
SHAPES = {
    **{f"transformer_blocks.7.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"transformer_blocks.0.attn.{name}": (WIDTH, WIDTH) for name in ("add_q_proj", "add_v_proj", "to_add_out")},
    "transformer_blocks.0.ff.net.0.proj": (WIDTH, MLP),
    "transformer_blocks.0.ff_context.net.2": (MLP, WIDTH),
    **{f"single_transformer_blocks.3.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.3.proj_mlp": (WIDTH, MLP),
    "single_transformer_blocks.4.proj_out": (WIDTH + MLP, WIDTH),
    "single_transformer_blocks.5.proj_mlp": (WIDTH, MLP),
}


@pytest.fixture(scope="module")
def weights():
    stream = torch.Generator().manual_seed(0)
    matrices = {
        path: (torch.randn(RANK, width, generator=stream), torch.randn(out, RANK, generator=stream))
        for path, (width, out) in SHAPES.items()
    }
    return LoraWeights({"transformer": matrices}, 2.0 * RANK, RANK)


def test_diffusers_reads_every_layer_back(weights):
    """As it was in the network: alpha / rank is in the matrices then."""
    state = FluxPipeline.lora_state_dict(to_kohya(weights, kohya))
    for path, (down, up) in weights.matrices["transformer"].items():
        got = state[f"transformer.{path}.lora_B.weight"] @ state[f"transformer.{path}.lora_A.weight"]
        assert torch.equal(got, up @ down * 2), path
    more = {name.removeprefix("transformer.").rsplit(".lora", 1)[0] for name in state} - set(SHAPES)
    assert not any(state[f"transformer.{path}.lora_B.weight"].any() for path in more)


def test_layers_that_are_one_in_kohyas_files_have_one_adapter(weights):
    state = to_kohya(weights, kohya)
    one = "lora_unet_single_blocks_3_linear1"
    assert state[f"{one}.lora_down.weight"].shape == (4 * RANK, WIDTH)
    assert state[f"{one}.lora_up.weight"].shape == (3 * WIDTH + MLP, 4 * RANK)
    assert float(state[f"{one}.alpha"]) == 8 * RANK
    assert float(state["lora_unet_double_blocks_7_img_attn_proj.alpha"]) == 2 * RANK


@pytest.mark.parametrize("path", ["x_embedder", "transformer_blocks.0.attn.to_nothing", "norm_out.linear"])
def test_a_layer_without_a_name_is_refused(path):
    with pytest.raises(ConfigError, match=path):
        kohya("transformer", path)
