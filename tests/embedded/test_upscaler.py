"""The upscaler: its pipeline shows it what it is trained on, its target fits its scheduler, it can be resumed."""

from functools import partial

import numpy as np
import pytest
import torch

from dbtrain_embedded import export, pool, upscaler, world


@pytest.fixture(scope="module")
def toy():
    """(untrained toy models, tokenizer)."""
    torch.manual_seed(0)
    tokenizer = upscaler.build_tokenizer()
    upscaler.FIT_STEPS, usual = 300, upscaler.FIT_STEPS
    models = upscaler.build(len(tokenizer), widths=(16, 32)).eval()
    upscaler.start_as_enlargement(models.unet)
    upscaler.FIT_STEPS = usual
    return models, tokenizer


def test_captions_are_whole_words_and_any_other_word_is_spelt():
    tokenizer = upscaler.build_tokenizer()
    for seed in range(200):
        caption = world.scene(seed)[1]
        assert len(tokenizer(caption.replace("-", " "))["input_ids"]) == len(caption.replace("-", " ").split()) + 1
    assert tokenizer.unk_token_id not in tokenizer("a photo of a xq7zzv dog!")["input_ids"]


@pytest.mark.parametrize("level", [0, 50, 249])
def test_the_guide_is_the_one_that_the_stock_pipeline_shows(toy, level):
    models, tokenizer = toy
    high, guide, captions = upscaler.held_out(2)
    seen = []
    hook = models.unet.register_forward_pre_hook(lambda unet, args, told: seen.append((args, told)), with_kwargs=True)
    upscaler.sample(models, tokenizer, guide, captions, level, steps=1)
    hook.remove()
    generator = torch.Generator().manual_seed(0)
    start, noise = (torch.randn(high.shape, generator=generator) for _ in range(2))
    table = upscaler.build_schedulers()[1].alphas_cumprod
    levels = torch.full((2,), level)
    guide = upscaler.noised(guide, noise, levels, table)
    ((shown, _), told) = seen[0]
    assert torch.equal(shown, torch.cat([start, guide], dim=1))
    assert torch.equal(told["class_labels"], levels)
    states = models.text(upscaler.tokens_of(tokenizer, captions), attention_mask=None).last_hidden_state
    assert told["encoder_hidden_states"].shape == states.shape


@pytest.mark.parametrize("place", [0, 4, 9])
def test_the_scheduler_finds_the_clean_picture_from_the_training_target(place):
    scheduler = upscaler.build_schedulers()[0]
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[place : place + 1]
    clean = upscaler.held_out(1)[0]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy, target = (upscaler.noised(*pair, t, scheduler.alphas_cumprod) for pair in ((clean, noise), (noise, -clean)))
    found = scheduler.step(target, int(t), noisy, generator=torch.Generator()).pred_original_sample
    assert torch.allclose(found, clean, atol=1e-5)


def test_training_starts_as_the_best_linear_estimate(toy):
    """Copying the guide need not be learnt: the untrained UNet already enlarges about as well as its guide."""
    models, tokenizer = toy
    high, guide, captions = upscaler.held_out(4)
    t, levels, (table, _) = torch.full((4,), 500), torch.zeros(4, dtype=torch.long), upscaler.tables()
    noisy = upscaler.noised(high, torch.randn(high.shape, generator=torch.Generator().manual_seed(0)), t, table)
    with torch.no_grad():
        said = models(noisy, guide, t, levels, upscaler.tokens_of(tokenizer, captions))
    c, d = (factor[:, None, None, None] for factor in upscaler.linear_estimate(t, levels))
    wanted = c * noisy - d * guide
    assert float((said - wanted).square().mean() / wanted.var()) < 0.1
    assert float(torch.corrcoef(torch.stack([said.flatten(), wanted.flatten()]))[0, 1]) > 0.95


def test_the_linear_estimate_is_the_best_one():
    """Of pictures that differ from their guide by RESIDUAL, no other factors of x_t and guide are closer to v."""
    generator = torch.Generator().manual_seed(0)
    table = upscaler.tables()[0].double()
    guide, rest, noise = (torch.randn(200_000, generator=generator).double() for _ in range(3))
    t, level = torch.tensor([300]), torch.tensor([0])
    alpha, sigma = table[t].sqrt(), (1 - table[t]).sqrt()
    clean = guide + upscaler.RESIDUAL * rest
    noisy, v = alpha * clean + sigma * noise, alpha * noise - sigma * clean
    best = torch.linalg.lstsq(torch.stack([noisy, -guide], dim=1), v[:, None]).solution[:, 0]
    found = torch.cat(upscaler.linear_estimate(t, level)).double()
    # 200,000 draws: the estimate's own error is below 0.01.
    assert torch.allclose(found, best, atol=0.02)


def test_guides_are_the_high_pictures_reduced_and_enlarged():
    high, guide, captions = upscaler.draw(6, np.random.default_rng(1))
    assert high.shape == guide.shape == (6, 3, 128, 128) and all(captions)
    kept, lost = high - guide, torch.nn.functional.avg_pool2d(high - guide, 2)
    assert 0 < 2 * float(lost.square().mean()) < float(kept.square().mean())


def test_psnr_of_a_known_error():
    true = torch.zeros(1, 3, 8, 8)
    assert upscaler.psnr(true + 0.2, true).item() == pytest.approx(20, abs=1e-4)


def test_training_learns_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(upscaler, "FIT_STEPS", 20)
    monkeypatch.setattr(upscaler, "build", partial(upscaler.build, widths=(16, 32)))
    upscaler.train(tmp_path, 0.01, batch=1)
    first = torch.load(tmp_path / "upscaler.pt", weights_only=True)
    assert first["step"] > 0
    upscaler.train(tmp_path, 0.01, batch=1)
    again = torch.load(tmp_path / "upscaler.pt", weights_only=True)
    assert again["step"] == first["step"]
    assert all(torch.equal(again["model"][name], value) for name, value in first["model"].items())
    upscaler.train(tmp_path, first["spent_s"] / 60 + 0.01, batch=1)
    more = torch.load(tmp_path / "upscaler.pt", weights_only=True)
    assert more["step"] > first["step"]
    changed = [name for name, value in first["model"].items() if not torch.equal(more["model"][name], value)]
    assert any(name.startswith("text.") for name in changed) and any(name.startswith("unet.") for name in changed)


def test_held_out_scenes_are_of_art_that_training_does_not_see():
    assert {world.scene(pool.HELD_OUT_SEED + i, "heldout", 128)[2]["vendor"] for i in range(16)} <= {
        "fluent-emoji",
        "fluent-emoji-flat",
    }


def test_the_exported_folder_is_a_stock_pipeline_of_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(upscaler, "build", partial(upscaler.build, widths=(16, 32)))
    models = upscaler.build(len(upscaler.build_tokenizer()))
    torch.save(models.state_dict(), tmp_path / "upscaler-start.pt")
    export.export_upscaler(tmp_path, tmp_path / "upscaler")
    loaded, tokenizer = upscaler.load(tmp_path / "upscaler")
    wanted = models.half().float().state_dict()
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == dict.fromkeys(wanted, torch.float32)
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    guide = torch.zeros(1, 3, 128, 128)
    assert upscaler.sample(loaded, tokenizer, guide, ["a photo of a dog"]).shape == guide.shape
