"""FLUX.1's kohya names: diffusers' converter of such files is the independent reader."""

import pytest
import torch
from diffusers import Flux2Pipeline, FluxPipeline, QwenImagePipeline, ZImagePipeline

from dbtrain.errors import ConfigError, DataError
from dbtrain.families import FAMILIES
from dbtrain.families.flow import underscored
from dbtrain.families.flux_names import kohya, with_diffusers_names
from dbtrain.models.adapter_names import to_kohya
from dbtrain.models.adapters import LoraWeights
from dbtrain.models.foreign_adapters import read_state, told_families
from dbtrain.results.exporting import export
from dbtrain.results.publish import read_lora, save_safetensors

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


def test_names_with_underscores_come_back():
    paths = ["attn.add_k_proj", "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.2"]
    shapes = {f"transformer_blocks.3.{path}": (32, 48) for path in paths}
    assert_same(QwenImagePipeline.lora_state_dict(to_kohya(drawn(shapes), underscored)), drawn(shapes))


@pytest.mark.parametrize("block", ["layers.3", "context_refiner.0"])
def test_z_images_q_k_and_v_are_one_layer_and_come_back(block):
    """ComfyUI knows no other names behind `lora_unet`: with q, k and v apart it left out the attention (0.8.0)."""
    paths = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w2"]
    weights = drawn({f"{block}.{path}": (32, 48) for path in paths})
    state = to_kohya(weights, FAMILIES["zimage"].kohya)
    layers = {name.rsplit(".lora", 1)[0].removesuffix(".alpha").split("_attention_")[-1] for name in state}
    assert {"qkv", "out"} < layers and not any("to_" in name for name in state)
    assert_same(ZImagePipeline.lora_state_dict(state), weights)


@pytest.mark.parametrize("path", ["x_embedder", "transformer_blocks.0.attn.to_nothing", "norm_out.linear"])
def test_a_layer_without_a_name_is_refused(path):
    with pytest.raises(ConfigError, match=path):
        kohya("transformer", path)


def update(weights, path):
    down, up = weights.matrices["transformer"][path]
    return weights.scale * up @ down


def narrow(width=8):
    """An adapter of FLUX.1's layers in a small width, at alpha 3 and rank 2."""
    stream = torch.Generator().manual_seed(0)
    sizes = {WIDTH: width, MLP: 4 * width, WIDTH + MLP: 5 * width}
    matrices = {
        path: (torch.randn(RANK, sizes[inp], generator=stream), torch.randn(sizes[out], RANK, generator=stream))
        for path, (inp, out) in SHAPES.items()
    }
    return LoraWeights({"transformer": matrices}, 3.0, RANK)


def comfy(state):
    """kohya's file as ComfyUI's own names have it."""
    layers = ("img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj", "img_mlp.0", "txt_mlp.2")
    renamed = {}
    for name, tensor in state.items():
        block, rest = name.removeprefix("lora_unet_").split("_blocks_")
        number, rest = rest.split("_", 1)
        for layer in layers:
            rest = rest.replace(layer.replace(".", "_"), layer)
        rest = rest.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        renamed[f"diffusion_model.{block}_blocks.{number}.{rest}"] = tensor
    return renamed


@pytest.mark.parametrize("names", ["kohya", "ComfyUI"])
def test_adapters_of_other_trainers_are_read_layer_by_layer(names, tmp_path):
    weights = narrow()
    state = to_kohya(weights, kohya)
    save_safetensors(tmp_path / "a.safetensors", comfy(state) if names == "ComfyUI" else state, {})
    back, _ = read_lora(tmp_path / "a.safetensors")
    assert set(back.matrices["transformer"]) == set(SHAPES) and told_families(back) == {"flux"}
    assert {len(down) for down, _ in back.matrices["transformer"].values()} == {RANK}  # no blocks of zeros
    for path in SHAPES:
        torch.testing.assert_close(update(back, path), update(weights, path))
    again = export(tmp_path / "a.safetensors", str(tmp_path / "b.safetensors"))
    for path in SHAPES:
        torch.testing.assert_close(update(read_lora(again)[0], path), update(weights, path))


def test_one_adapter_for_q_k_and_v_is_cut_in_three(tmp_path):
    """As kohya trains it: one A, and a B that no block of zeros parts."""
    down, up = torch.randn(4, 8), torch.randn(24, 4)
    name = "lora_unet_double_blocks_5_img_attn_qkv"
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    back = read_state(with_diffusers_names(state), {})
    parts = [update(back, f"transformer_blocks.5.attn.to_{letter}") for letter in "qkv"]
    torch.testing.assert_close(torch.cat(parts), up @ down * 0.5)


def test_an_adapter_that_has_learnt_nothing_keeps_its_layers():
    name = "lora_unet_single_blocks_0_linear1"
    state = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.zeros(56, 2)}
    assert len(read_state(with_diffusers_names(state), {}).matrices["transformer"]) == 4


def layer(name, inp, out, **more):
    ends = {"lora_down.weight": torch.ones(2, inp), "lora_up.weight": torch.ones(out, 2)}
    return {f"{name}.{end}": tensor for end, tensor in {**ends, **more}.items()}


REFUSED = {
    "a layer of another width": (layer("diffusion_model.double_blocks.0.img_attn.qkv", 8, 32), "no layer of FLUX;"),
    "a layer that FLUX.1 has not": (layer("lora_unet_double_blocks_0_img_qkv_new", 8, 24), "no layer of FLUX;"),
    "Stable Diffusion 3 in ComfyUI's names": (
        layer("diffusion_model.joint_blocks.0.x_block.attn.qkv", 8, 24), "in diffusers' names"),
    "Stable Diffusion 3 in kohya's names": (
        layer("lora_unet_joint_blocks_0_x_block_attn_qkv", 8, 24), "in diffusers' names"),
    "T5": (layer("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 8, 8), "in diffusers' names"),
    "half a pair": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(24, 2)}, "has no `down`"),
    "a convolution": (layer("lora_unet_single_blocks_0_linear2", 8, 8,
                            **{"lora_down.weight": torch.ones(2, 8, 1, 1)}), "no layer of FLUX;"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_transformers_are_refused_in_a_line(case):
    state, told = REFUSED[case]
    with pytest.raises(DataError, match=told) as refused:
        read_state(with_diffusers_names(state), {})
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("start", ["transformer.", "base_model.model.", "base_model.model.transformer."])
@pytest.mark.parametrize(
    "path, families",
    [
        ("single_transformer_blocks.0.proj_mlp", {"flux"}),
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", {"flux2", "flux2_klein"}),
        ("single_transformer_blocks.0.attn.to_out", {"flux2", "flux2_klein"}),
        ("transformer_blocks.0.attn.add_q_proj", {"sd3", "flux", "flux2", "flux2_klein", "qwen_image"}),
    ],
)
def test_diffusers_and_pefts_names_are_read_for_every_transformer(start, path, families):
    state = {f"{start}{path}.lora_A.weight": torch.ones(2, 8), f"{start}{path}.lora_B.weight": torch.ones(8, 2)}
    back = read_state(with_diffusers_names(state), {})
    assert set(back.matrices["transformer"]) == {path} and told_families(back) == families


SECOND = {
    "transformer_blocks.1.attn.to_q": (8, 8),
    "transformer_blocks.1.ff.linear_in": (8, 48),
    "transformer_blocks.1.ff_context.linear_out": (24, 8),
    "single_transformer_blocks.2.attn.to_qkv_mlp_proj": (8, 72),
    "single_transformer_blocks.2.attn.to_out": (32, 8),
}
"""Layers of FLUX.2, whose MLPs are three times as wide, and gated."""


@pytest.mark.parametrize("names", ["kohya", "ComfyUI"])
def test_the_second_flux_is_told_by_its_shapes(names):
    stream = torch.Generator().manual_seed(0)
    pairs = {path: (torch.randn(2, i, generator=stream), torch.randn(o, 2, generator=stream))
             for path, (i, o) in SECOND.items()}  # fmt: skip
    weights = LoraWeights({"transformer": pairs}, 2.0, 2)
    state = to_kohya(weights, kohya)
    back = read_state(with_diffusers_names(comfy(state) if names == "ComfyUI" else state), {})
    assert set(back.matrices["transformer"]) == set(SECOND) and told_families(back) == {"flux2", "flux2_klein"}
    for path in SECOND:
        torch.testing.assert_close(update(back, path), update(weights, path))
