"""FLUX.1's kohya names: diffusers' converter of such files is the independent reader."""

import pytest
import torch
from diffusers import Flux2Pipeline, FluxPipeline, QwenImagePipeline, ZImagePipeline

from dbtrain.errors import ConfigError
from dbtrain.families.flow import underscored
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


def drawn(shapes):
    stream = torch.Generator().manual_seed(0)
    matrices = {
        path: (torch.randn(RANK, width, generator=stream), torch.randn(out, RANK, generator=stream))
        for path, (width, out) in shapes.items()
    }
    return LoraWeights({"transformer": matrices}, 2.0 * RANK, RANK)


def assert_same(state, weights):
    """That a file's layers do what the weights do, whose alpha is twice their rank."""
    for path, (down, up) in weights.matrices["transformer"].items():
        got = state[f"transformer.{path}.lora_B.weight"] @ state[f"transformer.{path}.lora_A.weight"]
        assert torch.equal(got, up @ down * 2), path


@pytest.fixture(scope="module")
def weights():
    return drawn(SHAPES)


def test_diffusers_reads_every_layer_back(weights):
    """As it was in the network: alpha / rank is in the matrices then."""
    state = FluxPipeline.lora_state_dict(to_kohya(weights, kohya))
    assert_same(state, weights)
    more = {name.removeprefix("transformer.").rsplit(".lora", 1)[0] for name in state} - set(SHAPES)
    assert not any(state[f"transformer.{path}.lora_B.weight"].any() for path in more)


def test_layers_that_are_one_in_kohyas_files_have_one_adapter(weights):
    state = to_kohya(weights, kohya)
    one = "lora_unet_single_blocks_3_linear1"
    assert state[f"{one}.lora_down.weight"].shape == (4 * RANK, WIDTH)
    assert state[f"{one}.lora_up.weight"].shape == (3 * WIDTH + MLP, 4 * RANK)
    assert float(state[f"{one}.alpha"]) == 8 * RANK
    assert float(state["lora_unet_double_blocks_7_img_attn_proj.alpha"]) == 2 * RANK


def test_flux2s_layers_come_back_too():
    """Its single blocks hold attention and MLP in one layer already."""
    shapes = {
        "transformer_blocks.1.attn.to_k": (32, 48),
        "transformer_blocks.1.attn.add_q_proj": (32, 48),
        "transformer_blocks.0.ff.linear_in": (32, 96),
        "transformer_blocks.0.ff_context.linear_out": (96, 32),
        "single_transformer_blocks.2.attn.to_qkv_mlp_proj": (32, 240),
        "single_transformer_blocks.2.attn.to_out": (80, 32),
    }
    state = Flux2Pipeline.lora_state_dict(to_kohya(drawn(shapes), kohya))
    assert_same(state, drawn(shapes))


@pytest.mark.parametrize(
    ("pipeline", "paths"),
    [
        (
            QwenImagePipeline,
            ["attn.add_k_proj", "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.2"],
        ),
        (ZImagePipeline, ["attention.to_q", "attention.to_out.0", "feed_forward.w2"]),
    ],
    ids=["Qwen-Image", "Z-Image"],
)
def test_names_with_underscores_come_back(pipeline, paths):
    block = "layers.3" if pipeline is ZImagePipeline else "transformer_blocks.3"
    shapes = {f"{block}.{path}": (32, 48) for path in paths}
    assert_same(pipeline.lora_state_dict(to_kohya(drawn(shapes), underscored)), drawn(shapes))


@pytest.mark.parametrize("path", ["x_embedder", "transformer_blocks.0.attn.to_nothing", "norm_out.linear"])
def test_a_layer_without_a_name_is_refused(path):
    with pytest.raises(ConfigError, match=path):
        kohya("transformer", path)
