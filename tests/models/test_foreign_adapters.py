"""Adapters as other trainers name them: the same matrices come out, or one line says why not."""

import re
from pathlib import Path

import pytest
import torch

from dbtrain.errors import DataError
from dbtrain.families import FAMILIES
from dbtrain.models.adapter_names import to_diffusers, to_kohya
from dbtrain.models.adapters import LoraWeights
from dbtrain.models.foreign_adapters import read_state, told_families
from dbtrain.models.stability_names import to_stability

UNET = ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0", "mid_block.attentions.0.proj_in",
        "down_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj", "up_blocks.1.resnets.0.time_emb_proj",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2")  # fmt: skip
TEXT = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.11.mlp.fc1")


def made(components=("unet", "text_encoder"), alpha=2.0, rank=4):
    stream = torch.Generator().manual_seed(0)
    matrices = {
        component: {
            path: (torch.randn(rank, 6, generator=stream), torch.randn(5, rank, generator=stream))
            for path in (UNET if component == "unet" else TEXT)
        }
        for component in components
    }
    return LoraWeights(matrices, alpha, rank)


def renamed(weights, layer, down, up, alpha=True):
    """A state with a trainer's names: layer(component, path), and the two ends."""
    state = {}
    for component, matrices in weights.matrices.items():
        for path, pair in matrices.items():
            name = layer(component, path)
            state |= {name + down: pair[0], name + up: pair[1]}
            if alpha:
                state[f"{name}.alpha"] = torch.tensor(weights.alpha)
    return state


def comfy(component, path):
    if component == "unet":
        return f"diffusion_model.{to_stability(path)}"
    return f"text_encoders.clip_{'g' if component.endswith('2') else 'l'}.transformer.{path}"


def kohya_names(family):
    return lambda component, path: FAMILIES[family].kohya(component, path).name


BOTH, XL = ("unet", "text_encoder"), ("unet", "text_encoder", "text_encoder_2")
DOT = "{}.{}".format
TRAINERS = {
    "diffusers": (BOTH, DOT, ".lora_A.weight", ".lora_B.weight"),
    "diffusers 0.22": (BOTH, DOT, ".lora.down.weight", ".lora.up.weight"),
    "transformers": (BOTH, DOT, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "PEFT, named": (BOTH, "base_model.model.{}.{}".format, ".lora_A.default.weight", ".lora_B.default.weight"),
    "PEFT, one model": (("unet",), lambda _, path: f"base_model.model.{path}", ".lora_A.weight", ".lora_B.weight"),
    "PEFT, a text encoder": (("text_encoder",), lambda _, path: f"base_model.model.{path}", ".lora_A.weight",
                             ".lora_B.weight"),
    "processors": (("unet",), lambda c, path: f"{c}.{path}".replace(".to_", ".processor.to_").replace("to_out.0",
                   "to_out"), "_lora.down.weight", "_lora.up.weight"),
    "kohya": (BOTH, kohya_names("sd"), ".lora_down.weight", ".lora_up.weight"),
    "kohya XL": (XL, kohya_names("sdxl"), ".lora_down.weight", ".lora_up.weight"),
    "ComfyUI": (XL, comfy, ".lora_A.weight", ".lora_B.weight"),
    "ComfyUI, kohya's ends": (XL, comfy, ".lora_down.weight", ".lora_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_names_of_a_trainer(trainer):
    components, layer, down, up = TRAINERS[trainer]
    weights = made(components)
    if trainer == "processors":
        kept = {path: pair for path, pair in weights.matrices["unet"].items() if ".to_" in path}
        weights = LoraWeights({"unet": kept}, 2.0, 4)
    back = read_state(renamed(weights, layer, down, up, alpha=trainer != "processors"), {"lora_alpha": 2.0})
    assert (back.alpha, back.rank) == (2.0, 4)
    assert {c: set(m) for c, m in back.matrices.items()} == {c: set(m) for c, m in weights.matrices.items()}
    for component, matrices in weights.matrices.items():
        for path, pair in matrices.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, back.matrices[component][path])), path


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_every_golden_kohya_name_is_read_and_written_alike(family):
    """Names checked against kohya's own code when they were made."""
    lines = (Path(__file__).parents[1] / "golden" / f"kohya_{family}.txt").read_text().splitlines()
    shapes = {name: [int(n) for n in size.split("x")] if "x" in size else [] for name, size in map(str.split, lines)}
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    back = read_state(state, {})
    if family == "sdxl":  # the tiny Stable Diffusion has one layer a block, as no published one has
        assert set(to_kohya(back, FAMILIES[family].kohya)) == set(state)
    assert sum(map(len, back.matrices.values())) == len(state) // 3


def test_each_layer_has_its_own_rank_and_alpha():
    def update(weights, path):
        down, up = weights.matrices["unet"][path]
        return weights.scale * up @ down

    state, want = {}, {}
    for number, path in enumerate(UNET[:3]):
        rank, alpha = 2 + number, 1.0 + number
        down, up = torch.randn(rank, 6), torch.randn(5, rank)
        want[path] = alpha / rank * up @ down
        name = FAMILIES["sd"].kohya("unet", path).name
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    weights = read_state(state, {})
    assert weights.rank == 4
    for path, matrix in want.items():
        torch.testing.assert_close(update(weights, path), matrix)
    written = to_kohya(weights, FAMILIES["sd"].kohya)
    for path, matrix in want.items():
        name = FAMILIES["sd"].kohya("unet", path).name
        down, up = written[f"{name}.lora_down.weight"], written[f"{name}.lora_up.weight"]
        torch.testing.assert_close(written[f"{name}.alpha"] / len(down) * up @ down, matrix)


def test_pefts_patterns_and_stable_ranks_decide_alpha():
    weights = made(("unet",))
    state = to_diffusers(weights)
    patterned = read_state(state, {"unet.lora_alpha": 4, "unet.alpha_pattern": {UNET[0]: 8, "proj_in": 2}})
    before, after = weights.matrices["unet"], patterned.matrices["unet"]
    assert torch.equal(after[UNET[0]][1], before[UNET[0]][1] * 2)
    assert torch.equal(after[UNET[2]][1], before[UNET[2]][1] * 0.5)
    assert torch.equal(after[UNET[1]][1], before[UNET[1]][1])
    assert read_state(state, {"lora_alpha": 4, "use_rslora": True}).scale == 2


def one(name, down=(2, 3), up=(3, 2), **more):
    return {f"{name}.lora_A.weight": torch.ones(down), f"{name}.lora_B.weight": torch.ones(up), **more}


LAYER = f"unet.{UNET[0]}"
REFUSED = {
    "DoRA": ({**one(LAYER), f"{LAYER}.dora_scale": torch.ones(3)}, "is DoRA"),
    "LoHa": ({f"lora_unet_{UNET[0].replace('.', '_')}.hada_w1_a": torch.ones(2, 2)}, "is LoHa"),
    "LoKr": ({"lycoris_x.lokr_w1": torch.ones(2, 2)}, "is LoKr"),
    "a 3x3 convolution": (one("unet.conv_in", (2, 3, 3, 3), (3, 2, 1, 1)), "3x3 convolution"),
    "half a pair": ({f"{LAYER}.lora_A.weight": torch.ones(2, 3)}, "has no `up` matrix"),
    "alpha alone": ({f"{LAYER}.alpha": torch.ones(())}, "has no `down` matrix"),
    "two adapters": ({f"{LAYER}.lora_A.{n}.weight": torch.ones(2, 3) for n in "ab"}, "a second adapter"),
    "a video model": (one("diffusion_model.blocks.0.self_attn.q"), "name of no layer"),
    "weights": ({"unet.conv_in.weight": torch.ones(2, 2)}, "no adapter's name"),
    "nothing": ({}, "holds no adapter"),
    "ranks that differ": (one(LAYER, (2, 3), (3, 4)), "ranks 2 and 4"),
    "a scalar matrix": (one(LAYER, (), ()), "of 0 and 0 dimensions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_one_line_with_its_name(case):
    state, message = REFUSED[case]
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        read_state(state, {})
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("path, width, families", [
    (UNET[0], 6, {"sd", "sdxl"}), ("down_blocks.0.attentions.0.proj_in", 6, {"sd"}),
    ("up_blocks.3.attentions.0.proj_in", 6, {"sd"}), ("up_blocks.0.attentions.0.proj_in", 6, {"sdxl"}),
    ("mid_block.attentions.0.transformer_blocks.7.attn1.to_q", 6, {"sdxl"}),
    ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 768, {"sd"}),
    ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 2048, {"sdxl"})])  # fmt: skip
def test_layers_tell_the_family(path, width, families):
    assert told_families(LoraWeights({"unet": {path: (torch.ones(2, width), torch.ones(3, 2))}}, 2.0, 2)) == families
