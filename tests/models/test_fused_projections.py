"""Layers that read one input, computed together: the same outputs and gradients, in packs and in a real U-Net."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from dbtrain.bench.operators import Operators
from dbtrain.engines.capture import compile_regions
from dbtrain.engines.packed import Arena
from dbtrain.models.adapters import attach, chosen_rows, detach, layers
from dbtrain.models.fused_projections import FusedProjections, fuses, groups_of, joined, side_by_side
from dbtrain.packing import pack as pack_module
from dbtrain.settings.config import EngineConfig
from dbtrain.training.trainables import RECOMPUTED
from tests.kit.small_pack import Case, distance, equal, train_alone, train_pack

EXACT = 1e-12
CASES = [
    Case("rex", 1, 1e-2, 5, 2, 0.5, 0.58),
    Case("tom", 2, 3e-3, 4, 3, 0.25, 0.73),
    Case("ben", 3, 2e-2, 6, 1, 2.0, 1.24, "linear", 3),
]


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(pack_module, "fuses", lambda *_: True)


@pytest.mark.parametrize("up_ratio", [1.0, 4.0])
def test_every_subject_of_a_fused_pack_is_as_if_alone(fused, up_ratio):
    """With one arena, and with LoRA+, where A and B lie in two."""
    cases = [Case(**{**vars(case), "up_ratio": up_ratio}) for case in CASES]
    states, _, pack = train_pack(cases, torch.float64, size=2)
    # k and v together; the convolution apart.
    assert sorted(own.widths for own in pack.fused) == [[8], [8], [8], [8, 8]]
    for case in cases:
        assert distance(states[case.name], train_alone(case, torch.float64)) < EXACT, case.name


def test_neighbours_slot_and_order_change_no_bit(fused):
    first, _, _ = train_pack(CASES, torch.float32, size=2)
    again, _, _ = train_pack(CASES[::-1], torch.float32, size=2)
    assert all(equal(again[case.name], first[case.name]) for case in CASES)


@pytest.mark.parametrize(
    "chosen, device, together",
    [("auto", "cuda", True), ("auto", "cpu", False), ("on", "cpu", True), ("off", "cuda", False)],
)
def test_the_setting_decides(chosen, device, together):
    assert fuses(EngineConfig(fused_projections=chosen), device) == together


def unet(subjects=2, dtype=torch.float64):
    """A small U-Net of the real classes with filled adapters: 4 blocks, each of 8 linear layers and a convolution."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=8, norm_num_groups=8,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).to(dtype)  # fmt: skip
    attach(model, ("attn*.to_q", "attn*.to_k", "attn*.to_v", "attn*.to_out.0", "proj_in"), subjects, 2, 3.0)
    for _, layer in layers(model):
        layer.to(dtype)
        torch.nn.init.normal_(layer.down_NRD)
        torch.nn.init.normal_(layer.up_NDR, std=0.3)
    return model.train()


class Additions(Operators):
    """Also counts what is added into an arena's gradients. Autograd adds elsewhere too, in place or not as it likes."""

    def __init__(self, arena):
        super().__init__()
        self.arena, self.added = arena.grad.untyped_storage().data_ptr(), 0

    def saw(self, func, name, args, kwargs, result, kernels):
        self.added += name == "add_" and args[0].untyped_storage().data_ptr() == self.arena


def passed(model, groups, prepare=lambda model: None):
    """(output, gradients by name, operators) of a step of a model whose layers of these groups compute together."""
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    arena = Arena(side_by_side(trained, groups), False, torch.float32)
    with torch.no_grad():  # an arena begins with zeros; in training a seat fills it
        torch.manual_seed(1)
        for name in sorted(arena.params):
            arena.view(arena["master"], name).normal_(std=0.3)
    own = [FusedProjections(group) for group in groups]
    prepare(model)
    drawn = torch.Generator().manual_seed(2)
    x, told = (torch.randn(shape, dtype=torch.float64, generator=drawn) for shape in ((4, 4, 8, 8), (4, 5, 12)))
    with Additions(arena) as counted:
        output = model(x, torch.tensor([3, 500, 20, 9]), told, return_dict=False)[0]
        output.square().sum().backward()
    assert all(not one.waiting and one.input is None for one in own)
    return output.detach(), {name: arena.view(arena.grad, name) for name in arena.params}, counted


def assert_equal(got, want):
    assert (got[0] - want[0]).norm() < EXACT * want[0].norm()
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        assert (got[1][name] - grad).norm() < EXACT * grad.norm(), name


@pytest.fixture(scope="module")
def plain():
    return passed(unet(), [])


def test_a_unets_layers_are_grouped_by_their_input():
    apart, together = (groups_of(unet(), all_captions=whole) for whole in (False, True))
    assert sorted(map(len, apart)) == [1] * 12 + [2] * 4 + [3] * 4
    assert sorted(map(len, together)) == [1] * 12 + [3] * 4 + [8]


def test_a_unet_gives_the_same_and_adds_nothing_by_autograd(plain):
    model = unet()
    got = passed(model, groups_of(model, True))
    assert_equal(got, plain)
    # 17 groups and 4 convolutions, which stay as they were, add two gradients each into the arena; 36 layers did.
    assert (got[2].added, plain[2].added) == (2 * 21, 2 * 36)
    fused, apart = got[2].names, plain[2].names
    assert fused["mm"] + fused["addmm"] < apart["mm"] + apart["addmm"]


def test_recomputed_blocks_give_the_same(plain):
    model = unet()
    got = passed(model, groups_of(model, False), lambda net: net.enable_gradient_checkpointing(RECOMPUTED))
    assert_equal(got, plain)


def test_compiled_blocks_give_the_same(plain):
    model = unet()
    regions = ("BasicTransformerBlock",)
    got = passed(model, groups_of(model, False), lambda net: compile_regions(net, regions, "aot_eager"))
    torch._dynamo.reset()
    assert_equal(got, plain)


def test_pictures_are_drawn_row_by_row_and_a_detached_base_is_as_it_was():
    model, bare = unet(), unet()
    passed(model, groups_of(model, True))
    x, told = torch.ones(2, 4, 8, 8, dtype=torch.float64), torch.ones(2, 5, 12, dtype=torch.float64)
    with torch.no_grad(), chosen_rows([model], [1, 1]):
        first, second = model(x, 7, told, return_dict=False)[0]
    assert torch.allclose(first, second, rtol=0, atol=1e-12)
    for one in (model, bare):
        detach(one)
    with torch.no_grad():
        got, want = (one(x, 7, told, return_dict=False)[0] for one in (model, bare))
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_matrices_that_lie_apart_are_not_joined():
    arena = torch.zeros(2, 30)
    parts = [arena[:, start : start + 6].view(2, 2, 3) for start in (0, 6, 18)]
    assert joined(parts[:2]).shape == (2, 4, 3)
    with pytest.raises(AssertionError, match="side by side"):
        joined(parts)
