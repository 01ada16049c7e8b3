"""Stacked LoRA layers against solo ones, PEFT's forward pass, and the key names of other programs."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.models.adapter_names import to_diffusers, to_kohya
from dbtrain.models.adapters import (
    LoraWeights,
    StackedLora,
    attach,
    detach,
    layers,
    matching_layers,
    renamed,
    reset_row,
    write_rows,
)
from dbtrain.models.foreign_adapters import read_state
from dbtrain.models.load import load_models
from dbtrain.settings.config import LoraConfig as Settings
from dbtrain.settings.config import ModelConfig
from tests.kit.adapter_rows import read_rows

GOLDEN = Path(__file__).parents[1] / "golden"
WITH_CONV = ("attn*.to_q", "attn*.to_k", "attn*.to_v", "attn*.to_out.0", "proj_in")
BASES = {"linear": (lambda: nn.Linear(6, 5), (4, 3, 6)), "conv": (lambda: nn.Conv2d(6, 5, 1), (4, 6, 3, 2))}


def seeded(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(base, subjects, rank, scale=0.5, seed=0):
    layer = StackedLora(base, subjects, rank, scale).double()
    with torch.no_grad():
        layer.down_NRD.copy_(seeded(*layer.down_NRD.shape, seed=seed))
        layer.up_NDR.copy_(seeded(*layer.up_NDR.shape, seed=seed + 1))
    return layer


@pytest.mark.parametrize("kind", BASES)
def test_three_stacked_subjects_are_three_solo_layers(kind):
    make, shape = BASES[kind]
    base = make().double().requires_grad_(False)
    stack = filled(base, 3, 2)
    stack.scale_N.copy_(torch.tensor([0.5, 1.0, 3.0]))
    x = seeded(3 * shape[0], *shape[1:], seed=9).requires_grad_()
    grad_out = seeded(*stack(x).shape, seed=10)
    out = stack(x)
    got = torch.autograd.grad(out, [x, stack.down_NRD, stack.up_NDR], grad_out)
    for n in range(3):
        solo = StackedLora(base, 1, 2, float(stack.scale_N[n])).double()
        with torch.no_grad():
            solo.down_NRD.copy_(stack.down_NRD[n : n + 1])
            solo.up_NDR.copy_(stack.up_NDR[n : n + 1])
        rows = slice(n * shape[0], (n + 1) * shape[0])
        part = x.detach()[rows].requires_grad_()
        alone = solo(part)
        want = torch.autograd.grad(alone, [part, solo.down_NRD, solo.up_NDR], grad_out[rows])
        # float64, sums of at most 24 products.
        assert torch.allclose(out[rows], alone, rtol=0, atol=1e-14)
        assert torch.allclose(got[0][rows], want[0], rtol=0, atol=1e-13)
        assert torch.allclose(got[1][n], want[1][0], rtol=0, atol=1e-13)
        assert torch.allclose(got[2][n], want[2][0], rtol=0, atol=1e-13)
    assert not torch.allclose(out[: shape[0]], base(x[: shape[0]]))


@pytest.mark.parametrize("kind", BASES)
def test_the_update_is_scale_b_a_x(kind):
    """The same layer with the update merged into its weight: W + scale B A."""
    make, shape = BASES[kind]
    base = make().double()
    layer = filled(base, 1, 2, scale=0.75)
    x = seeded(*shape)
    out = layer(x)
    with torch.no_grad():
        base.weight += (0.75 * layer.up_NDR[0] @ layer.down_NRD[0]).reshape(base.weight.shape)
    assert torch.allclose(out, base(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", BASES)
def test_gradients_are_finite_differences(kind):
    make, shape = BASES[kind]
    layer = filled(make().double(), 2, 2)
    assert torch.autograd.gradcheck(layer, (seeded(*shape).requires_grad_(),))


def test_a_smaller_rank_is_padded_with_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.to_q = nn.Linear(6, 5)

    model, solo = Model(), Model()
    attach(model, ["to_q"], 2, 4, 4.0)
    reset_row(model, "unet", 1, 0, "other")
    layer = model.to_q
    with torch.no_grad():
        layer.up_NDR.normal_(), layer.down_NRD.normal_()
    other = layer.down_NRD[1].clone()
    down, up = torch.randn(2, 6), torch.randn(5, 2)
    write_rows({"unet": model}, 0, LoraWeights({"unet": {"to_q": (down, up)}}, 3.0, 2))
    assert (layer.down_NRD[0, 2:] == 0).all() and (layer.up_NDR[0, :, 2:] == 0).all()
    assert torch.equal(layer.down_NRD[1], other) and layer.scale_N.tolist() == [1.5, 1.0]
    attach(solo, ["to_q"], 1, 2, 3.0)
    write_rows({"unet": solo}, 0, LoraWeights({"unet": {"to_q": (down, up)}}, 3.0, 2))
    x = torch.randn(4, 6)
    # float32, sums of 6 and of 4 products of size one: a few units in the last place of their sizes.
    assert torch.allclose(layer(torch.cat([x, x]))[:4], solo.to_q(x), rtol=0, atol=32 * 2.0**-23)


@pytest.mark.parametrize("kind", BASES)
def test_samples_of_one_adapter_go_through_one_matrix_where_that_is_cheaper(kind):
    """More than in * out / (in + out) = 2.7 positions for each of the two runs, in both halves that guidance makes."""
    make, (_, *rest) = BASES[kind]
    stack = filled(make().double(), 3, 2)
    stack.scale_N.copy_(torch.tensor([0.5, 1.0, 3.0]))
    stack.rows = torch.tensor([2, 0, 0])
    x = seeded(6, *rest, seed=9)
    with torch.no_grad():
        plain, stack.folds = stack(x), True
        folded = stack(x)
        few = x[:3, :, :1, :1] if kind == "conv" else x[:3, :1]
        assert stack._folds(x, stack.rows) and not stack._folds(few, stack.rows)
    assert (folded - plain).abs().max() < 1e-14 * 100 and not stack._folds(x, stack.rows)


def test_reset_rows_are_independent():
    def rows(order, subjects=3):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        attach(model, ["*"], subjects, 2, 2.0)
        for row, subject in order:
            reset_row(model, "unet", row, 7, subject)
        return {path: layer.down_NRD.detach().clone() for path, layer in layers(model)}

    packed, alone = rows([(2, "rex"), (0, "tom"), (1, "ada")]), rows([(0, "rex")], 1)
    for path in packed:
        assert torch.equal(packed[path][2], alone[path][0])  # neither row, neighbours nor order matter
        assert not torch.equal(packed[path][0], packed[path][1])
    assert not torch.equal(packed["0"][2].flatten()[:8], packed["1"][2].flatten())
    bound = 8**-0.5
    assert packed["0"].abs().max() <= bound and packed["0"].abs().max() > 0.8 * bound


def test_a_fresh_adapter_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(3, 8)
    before = model(x)
    attach(model, ["0"], 1, 2, 2.0)
    reset_row(model, "unet", 0, 0, "rex")
    assert torch.equal(model(x), before)
    layers(model)[0][1].up_NDR.data.normal_()
    assert not torch.equal(model(x), before)


def test_no_matching_layer_is_an_error_that_names_the_patterns():
    with pytest.raises(ConfigError, match="nothing_like_this"):
        attach(nn.Sequential(nn.Linear(2, 2)), ["nothing_like_this"], 1, 2, 2.0)


def test_only_pointwise_convolutions_match():
    model = nn.ModuleDict(
        {
            "one": nn.Conv2d(2, 2, 1),
            "three": nn.Conv2d(2, 2, 3),
            "stride": nn.Conv2d(2, 2, 1, stride=2),
            "groups": nn.Conv2d(2, 2, 1, groups=2),
        }
    )
    assert matching_layers(model, ["*"]) == ["one"]


UNETS = ("sd", "sdxl")


@pytest.fixture
def models(model_folders, request):
    family = request.param
    return FAMILIES[family], load_models(FAMILIES[family], ModelConfig(family=family, path=str(model_folders[family])))


def latents(family, models):
    count = 2
    states = torch.randn(count, 77, models.denoiser.config.cross_attention_dim)
    added = (
        {"text_embeds": torch.randn(count, 48), "time_ids": torch.randn(count, 6)} if family.name == "sdxl" else None
    )
    x = torch.randn(count, 4, 16, 16)
    return (x, torch.tensor([10, 700]), states), {"added_cond_kwargs": added, "return_dict": False}


@pytest.mark.parametrize("models", UNETS, indirect=True)
@torch.no_grad()
def test_detach_restores_every_bit(models):
    family, models = models
    inputs, more = latents(family, models)
    before, names = models.denoiser(*inputs, **more)[0], list(models.denoiser.state_dict())
    attach(models.denoiser, WITH_CONV, 1, 4, 2.0)
    for _, layer in layers(models.denoiser):
        layer.down_NRD.normal_(), layer.up_NDR.normal_()
    assert not torch.equal(models.denoiser(*inputs, **more)[0], before)
    detach(models.denoiser)
    assert torch.equal(models.denoiser(*inputs, **more)[0], before)
    assert list(models.denoiser.state_dict()) == names


@pytest.mark.parametrize("models", UNETS, indirect=True)
@torch.no_grad()
def test_forward_is_pefts(models):
    family, models = models
    inputs, more = latents(family, models)
    attach(models.denoiser, WITH_CONV, 1, 4, 2.0)
    for _, layer in layers(models.denoiser):
        layer.down_NRD.normal_(0, 0.3), layer.up_NDR.normal_(0, 0.3)
    matrices = read_rows({"unet": models.denoiser}, 0, 2.0).matrices["unet"]
    ours = models.denoiser.double()(*doubled(inputs), **doubled(more))[0]
    detach(models.denoiser)
    peft = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2.0, target_modules=list(matrices)), models.denoiser)
    peft.double()
    for path, (down, up) in matrices.items():
        layer = peft.get_submodule(path)
        layer.lora_A["default"].weight.copy_(down.view_as(layer.lora_A["default"].weight))
        layer.lora_B["default"].weight.copy_(up.view_as(layer.lora_B["default"].weight))
    # Ours and PEFT's differ in the order of sums, and for a 1x1 convolution so do processors: some roundings of 1e-16.
    torch.testing.assert_close(peft(*doubled(inputs), **doubled(more))[0], ours, rtol=1e-12, atol=1e-12)


def doubled(values):
    """The tensors of floats anywhere in a tuple or dict as float64."""
    if isinstance(values, torch.Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, dict):
        return {name: doubled(value) for name, value in values.items()}
    return tuple(map(doubled, values)) if isinstance(values, tuple) else values


def random_weights(family, models, patterns=WITH_CONV, alpha=2.0, rank=4):
    """An adapter of random numbers on the denoiser and the text encoders; the models stay as they are."""
    components = models.components(family.denoiser)
    generator = torch.Generator().manual_seed(0)
    for name, module in components.items():
        attach(module, patterns if name == family.denoiser else Settings().text_targets, 1, rank, alpha)
        for _, layer in layers(module):
            layer.down_NRD.data.normal_(0, 0.3, generator=generator)
            layer.up_NDR.data.normal_(0, 0.3, generator=generator)
    weights = read_rows(components, 0, alpha)
    for module in components.values():
        detach(module)
    return weights


@pytest.mark.parametrize("models", UNETS, indirect=True)
def test_kohya_keys_are_the_golden_list(models):
    family, models = models
    state = to_kohya(random_weights(family, models), family.kohya)
    got = [f"{name} {'x'.join(map(str, tensor.shape)) or 'scalar'}" for name, tensor in sorted(state.items())]
    assert got == (GOLDEN / f"kohya_{family.name}.txt").read_text().splitlines()
    assert all(float(state[name]) == 2.0 for name in state if name.endswith(".alpha"))


@pytest.mark.parametrize("short", [False, True], ids=["long names", "short names of older files"])
@pytest.mark.parametrize("models", UNETS, indirect=True)
def test_what_was_written_is_read_back(models, short):
    family, models = models
    weights = random_weights(family, models)
    state = to_diffusers(weights)
    assert all(".text_model." in name for name in state if name.startswith("text_encoder"))
    if short:
        state = {name.replace("text_encoder.text_model.", "text_encoder."): value for name, value in state.items()}
    back = renamed(models.components(family.denoiser), read_state(state, {"lora_alpha": 2.0}))
    assert (back.alpha, back.rank, back.conv) == (weights.alpha, weights.rank, weights.conv)
    assert len(weights.conv) == (4 if family.name == "sd" else 0)  # SDXL's proj_in is linear
    assert {c: set(m) for c, m in back.matrices.items()} == {c: set(m) for c, m in weights.matrices.items()}
    for component, matrices in weights.matrices.items():
        for path, pair in matrices.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, back.matrices[component][path]))
    assert read_state(state, {}).alpha == 4


def test_folding_keeps_every_update():
    down, up = torch.ones(2, 3), torch.full((3, 2), 3.0)
    weights = LoraWeights({"unet": {"a": (down, up)}}, 1.0, 4)
    folded = weights.folded(2.0)
    assert (folded.alpha, folded.scale) == (4.0, 1.0)
    assert torch.equal(folded.matrices["unet"]["a"][1], up * 0.5)
    same = LoraWeights({"unet": {"a": (down, up)}}, 2.0, 2)
    assert same.folded() is same
