"""The roofline: exact counts on the meta device, checked by hand where they can be, and what a card makes of them."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dbtrain.bench import roofline, to_nobody
from dbtrain.bench.cards import CARDS
from dbtrain.bench.flops import count_flops
from dbtrain.bench.gpu_forms import flash, one_kernel_norms
from dbtrain.bench.roofline import Part, count, meta_step, modelled, shape_of, table, targets_of
from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain_kernels import reference
from dbtrain_kernels.group_norm import group_norm

TARGETS = ("attn*.to_q", "attn*.to_k", "attn*.to_v", "attn*.to_out.0")
SMALL = {
    "sd": {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 8,
           "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
           "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
}  # fmt: skip


def small(family):
    """A published architecture, cut down."""
    row = FAMILIES[family]
    shape = next(iter(row.shapes.values()))
    return row, replace(shape, config={**shape.config, **SMALL[family]}, latent_side=16)


@pytest.fixture(scope="module")
def counts():
    return {name: count(name, *small(name), 2, targets_of(FAMILIES[name])) for name in SMALL}


@pytest.mark.parametrize("family", SMALL)
def test_operations_are_those_of_pytorchs_counter(family, counts):
    step = meta_step(*small(family), 2, targets_of(FAMILIES[family]))
    with flash():
        forward = count_flops(lambda: step.forward())
        both = count_flops(lambda: step.backward(step.forward()))
    assert (counts[family].operations, counts[family].forward) == (both, forward // 4)


def test_sizes_are_those_of_the_model(counts):
    family, shape = small("sd")
    model = shape.blank("meta")
    assert counts["sd"].params == sum(param.numel() for param in model.parameters())
    one = count("sd", family, shape, 1, TARGETS)
    assert one.trained == counts["sd"].trained and one.layers == counts["sd"].layers > 0
    assert counts["sd"].kept == pytest.approx(2 * one.kept, rel=0.05)
    less = count("sd", family, shape, 1, TARGETS, recompute=True)
    assert less.kept < one.kept and less.operations > one.operations


def test_bytes_of_a_product_by_hand():
    costs = roofline._Costs()
    with costs:
        a, b = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in ((3, 5), (5, 7)))
        a @ b
        a[:1].expand(3, 5) + a
    products, rest = costs.parts["matrix products"].rows, costs.parts["pointwise, norms, copies"].rows
    assert products == [(1, 2 * (15 + 35 + 21), 2 * 3 * 5 * 7)]
    assert rest == [(1, 2 * (15 + 15 + 15), 0)], "an expanded row is read from the memory of its tensor"


def test_a_norm_is_one_kernel_each_way_by_hand():
    costs, norm = roofline._Costs(), torch.nn.RMSNorm(5, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.empty(3, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with costs, one_kernel_norms(lambda *row: costs.note("norms", *row)):
        norm(x).backward(torch.empty_like(x))
    assert costs.parts["norms"].rows == [(1, 2 * 15 * 2, 0), (1, 2 * 15 * 3, 0)] and [*costs.parts] == ["norms"]


@pytest.mark.parametrize("row, bound, ms", [
    ((1000, 1, 1), "launches", 1.6), ((1, 10**10, 1), "memory", 1e10 / (4.8e12 * 0.79) * 1e3),
    ((1, 1, 10**12), "compute", 1e12 / (989e12 * 0.52) * 1e3),
])  # fmt: skip
def test_what_bounds_an_operator(row, bound, ms):
    times = Part([row]).times_ms("matrix products", CARDS["H200"])
    assert max(times, key=lambda name: times[name]) == bound
    assert times[bound] == pytest.approx(ms)


def test_a_card_with_less_is_slower_and_fp32_takes_twice(counts):
    made = {name: modelled(counts["sd"], card) for name, card in CARDS.items()}
    assert made["H200"]["modelled_ms"] < made["A100"]["modelled_ms"] < made["T4"]["modelled_ms"]
    assert made["T4"]["gb"] == 2 * made["H200"]["gb"]
    assert made["H200"]["floor_ms"] == pytest.approx(counts["sd"].operations / 989e9)
    assert made["H200"]["a_subject_ms"] * 2 == made["H200"]["modelled_ms"]
    weights, state = counts["sd"].params * 2, counts["sd"].trained * 2 * 18
    assert made["H200"]["memory_gib"] == pytest.approx((weights + state + counts["sd"].kept) / 2**30)


def test_a_faster_attention_changes_its_own_parts_alone(counts):
    plain, faster = (modelled(counts["sd"], CARDS["H200"], name)["parts"] for name in ("flash", "cudnn"))
    for name, part in plain.items():
        assert faster[name]["ms"] * (1.4 if "attention" in name else 1) == pytest.approx(part["ms"])


def last(tensor):
    return tensor.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("x_last, weight_last, copies, copies_back", [
    (False, False, [15, 21], [21, 15]), (True, True, [], []), (False, True, [15], []), (True, False, [], []),
])  # fmt: skip
def test_copies_of_layouts_by_hand(x_last, weight_last, copies, copies_back):
    """Of the picture [1, 15, 4, 4], the result and their gradients; cuDNN's results lie as it computes."""
    x, weight = (torch.empty(shape, device="meta") for shape in ((1, 15, 4, 4), (21, 15, 3, 3)))
    x, weight = last(x) if x_last else x, last(weight) if weight_last else weight
    costs = roofline._Costs()
    with costs:
        y = F.conv2d(x.requires_grad_(), weight, padding=1)
        (of_x,) = torch.autograd.grad(y, x, torch.empty_like(y))
    rows = costs.parts["layout of convolutions"].rows if copies else []
    assert rows == [(len(each), 2 * 4 * 16 * sum(each), 0) for each in (copies, copies_back) if each]
    for made in (y, of_x):
        assert made.is_contiguous(memory_format=torch.channels_last) == (x_last or weight_last)


def test_a_group_norm_by_hand():
    """PyTorch's is three kernels that read x twice, and four that read x and the gradient twice; ours three and three.
    Means and the like are small."""
    x, w = torch.empty(2, 32, 64, 64, device="meta", requires_grad=True), torch.empty(32, device="meta")
    for norm, kernels, passes in (
        (reference.group_norm, [3, 1, 1, 4], [3, 2, 3, 5]), (group_norm, [3, 3], [3, 5]),
    ):  # fmt: skip
        costs = roofline._Costs()
        with costs:
            y = norm(x, 8, w, w, 1e-5)
            torch.autograd.grad(y, x, torch.empty_like(y))
        rows = costs.parts["pointwise, norms, copies"].rows
        assert [row[0] for row in rows] == kernels
        assert [round(row[1] / (4 * x.numel()), 1) for row in rows] == passes


def test_names_and_cards_are_checked():
    with pytest.raises(ConfigError, match="no architecture 'nope'; give one of sd15"):
        roofline.measure(["nope"], [1], ["H200"], False, to_nobody)
    with pytest.raises(ConfigError, match="--card: got 'X'"):
        roofline.measure(["sd15"], [1], ["X"], False, to_nobody)
    with pytest.raises(ConfigError, match="--attention: got 'X', want flash or cudnn"):
        roofline.measure(["sd15"], [1], ["H200"], False, to_nobody, "X")


def test_the_table_names_what_bounds(counts):
    row = {"model": "x", "subjects": 2, "card": "H200", **modelled(counts["sd"], CARDS["H200"])}
    text = table([row])
    assert "| x | 2 | H200 |" in text and "| attention, backward |" in text
    assert "attention, backward" not in table([row, row])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folders_own_architecture_is_counted(name, model_folders):
    family, folder = FAMILIES[name], model_folders[name]
    shape = shape_of(family, folder)
    config = json.loads((folder / family.denoiser / "config.json").read_text())
    assert all(shape.config[key] == (tuple(value) if isinstance(value, list) else value)
               for key, value in config.items() if key[0] != "_")  # fmt: skip
    cut = replace(shape, latent_side=min(shape.latent_side, 16))
    made = count(name, family, cut, 1, targets_of(family))
    assert made.params > 0 and made.kept > 0 and not math.isnan(modelled(made, CARDS["H200"])["modelled_ms"])


SIZES = {"if_i_xl": 4.3, "if_ii_l": 1.2, "x4_upscaler": 0.47}
"""Billions of numbers of the pixel cascade's U-Nets, as their model cards and their files say."""


@pytest.mark.parametrize("name", SIZES)
def test_a_published_shape_has_its_size(name):
    _, shape = roofline.architectures()[name]
    params = sum(param.numel() for param in shape.blank("meta").parameters())
    assert params / 1e9 == pytest.approx(SIZES[name], rel=0.02)


@pytest.mark.parametrize("name, low", [("if_ii_l", 64), ("x4_upscaler", 128)])
def test_what_a_denoiser_enlarges_is_a_quarter_of_its_pixels(name, low):
    batch = roofline.batch_of(*roofline.architectures()[name], 1)
    assert batch.low_BCHW.shape == (2, 3, low, low)
