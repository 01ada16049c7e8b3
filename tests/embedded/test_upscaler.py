"""The upscaler begins as its guide, its norms do not see the picture, and its pipeline shows what it is trained on."""

import numpy as np
import pytest
import torch

from dbtrain.tiny import UPSCALER
from dbtrain_embedded import upscaler


@pytest.fixture(scope="module")
def toy():
    """(untrained UNet, one with every weight but those that are held moved)."""
    torch.manual_seed(0)
    fresh, moved = upscaler.build(16), upscaler.build(16)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    upscaler.hold(upscaler.copying(moved) + upscaler.steadying(moved))
    return fresh.eval(), moved.eval()


def inputs(side=32, count=2):
    shown = torch.randn(count, 6, side, side, generator=torch.Generator().manual_seed(1)) / 2
    return shown, torch.tensor([999, 5]), torch.tensor([0, 30])


@torch.no_grad()
def said(unet, shown, t, levels):
    return unet(shown, t, torch.zeros(len(shown), 1, 128), class_labels=levels).sample


def test_an_untrained_upscaler_answers_with_its_guide(toy):
    shown, t, levels = inputs()
    answer = said(toy[0], shown, t, levels)
    assert torch.allclose(answer[:, :3], shown[:, 3:], atol=1e-3) and not answer[:, 3:].any()


def test_the_head_is_the_whole_unet_until_its_other_layers_are_trained(toy):
    shown, t, levels = inputs()
    assert torch.allclose(upscaler.head(toy[0], shown, t, levels), said(toy[0], shown, t, levels), atol=1e-4)
    assert not torch.allclose(upscaler.head(toy[1], shown, t, levels), said(toy[1], shown, t, levels), atol=1e-2)


def test_a_norm_divides_by_the_same_whatever_the_picture_shows(toy):
    """So what is learnt on crops holds for whole pictures."""
    seen = []
    norms = [module for module in toy[1].modules() if isinstance(module, torch.nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(lambda norm, given: seen.append(given[0].std().item())) for norm in norms]
    shown, t, levels = inputs()
    said(toy[1], shown, t, levels)
    said(toy[1], 3 * shown, t, levels)
    for hook in hooks:
        hook.remove()
    first, second = np.array(seen[: len(norms)]), np.array(seen[len(norms) :])
    assert len(norms) == 7 and np.abs(second / first - 1).max() < 0.02


def test_crops_are_of_one_place_and_mostly_where_the_guide_is_wrong():
    torch.manual_seed(0)
    clean = torch.arange(96.0 * 96).view(1, 1, 96, 96).repeat(2, 3, 1, 1) / 9216
    guide = clean.clone()
    guide[:, :, 60:, 60:] += 1
    high, low, _ = upscaler.crops(clean, guide, 50, 24)
    assert high.shape == low.shape == (100, 3, 24, 24)
    wrong = (low - high).flatten(1)
    assert set(wrong.unique().round(decimals=3).tolist()) == {0.0, 1.0}
    assert (wrong.mean(dim=1) > 0.1).float().mean() > 0.8


@torch.no_grad()
def test_a_crop_shows_what_the_whole_picture_shows_wherever_it_counts(toy, monkeypatch):
    """Its own edges do not count, and those of the picture count more."""
    monkeypatch.setattr(torch, "multinomial", lambda odds, each, replacement: torch.arange(each).repeat(len(odds), 1))
    shown, t, levels = inputs()
    whole = upscaler.head(toy[1], shown, t, levels)[:, :3]
    clean, guide, weight = upscaler.crops(shown[:, :3], shown[:, 3:], 9, 24)
    wanted, _, _ = upscaler.crops(whole, whole, 9, 24)
    told = (each.repeat_interleave(9) for each in (t, levels))
    error = (upscaler.head(toy[1], torch.cat([clean, guide], dim=1), *told)[:, :3] - wanted).abs().mean(dim=1)
    counts = weight[:, 0] > 0
    assert error[counts].max() < 0.005 and error[~counts].mean() > 0.02
    corner, middle = weight[0, 0], weight[4, 0]
    assert corner[:4, :20].eq(upscaler.BORDER).all() and corner[4:20, 4:20].eq(1).all() and not corner[20:].any()
    assert middle[4:20, 4:20].eq(1).all() and middle.sum() == 16 * 16


@pytest.mark.parametrize("level", [0, 50, 249])
def test_the_guide_is_the_one_that_the_stock_pipeline_shows(toy, level):
    high, guide, captions = upscaler.held_out(2)
    unet, seen = toy[1], []
    hook = unet.register_forward_pre_hook(lambda unet, args, told: seen.append((args, told)), with_kwargs=True)
    pipe = upscaler.pipeline(unet, upscaler.build_text(), upscaler.build_tokenizer())
    upscaler.sample(pipe, guide, captions, level)
    hook.remove()
    generator = torch.Generator().manual_seed(0)
    start, noise = (torch.randn(high.shape, generator=generator) for _ in range(2))
    levels, table = torch.full((2,), level), upscaler.build_schedulers()[1].alphas_cumprod
    (((shown, t), told),) = seen
    assert torch.equal(shown, torch.cat([start, upscaler.noised(guide, noise, levels, table)], dim=1)) and t == 999
    assert torch.equal(told["class_labels"], levels)
    states = upscaler.states_of(upscaler.build_text(), upscaler.build_tokenizer(), captions)
    assert torch.equal(told["encoder_hidden_states"], states)


def test_the_shipped_upscaler_beats_bicubic_in_the_stock_pipeline():
    from diffusers import IFSuperResolutionPipeline

    pipe = IFSuperResolutionPipeline.from_pretrained(UPSCALER)
    pipe.set_progress_bar_config(disable=True)
    high, guide, captions = upscaler.held_out(4)
    gained = upscaler.psnr(upscaler.sample(pipe, guide, captions), high) - upscaler.psnr(guide, high)
    assert gained.min() > 0 and gained.mean() > 1.5


def test_psnr_and_border_error_of_a_known_error():
    true = torch.zeros(1, 3, 8, 8)
    assert upscaler.psnr(true + 0.2, true).item() == pytest.approx(20, abs=1e-4)
    made = true + 0.2
    made[:, :, 1:-1, 1:-1] = 0.9
    assert upscaler.border_error(made, true, 1).item() == pytest.approx(0.2 * 127.5, abs=1e-3)


def test_training_learns_goes_on_where_it_stopped_and_is_exported(tmp_path):
    upscaler.train(tmp_path, 0.02, batch=1, each=2)
    first = torch.load(tmp_path / "upscaler.pt", weights_only=True)
    assert first["step"] > 0
    upscaler.train(tmp_path, first["spent_s"] / 60 + 0.01, batch=1, each=2)
    more = torch.load(tmp_path / "upscaler.pt", weights_only=True)
    assert more["step"] > first["step"]
    assert any(not torch.equal(more["model"][name], value) for name, value in first["model"].items())
    upscaler.export(tmp_path, tmp_path / "pipe")
    assert (tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 1e6
