"""Super-resolution: what a U-Net is shown in training is what its stock pipeline shows it, to the bit."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dbtrain.data.images import square, to_pixels
from dbtrain.families import FAMILIES
from dbtrain.models.family import exactly
from dbtrain.models.load import load_models
from dbtrain.models.sampling import Chain, generate, make_enlarger, make_pipeline
from dbtrain.settings.config import DataConfig, ModelConfig, RunConfig, SampleConfig, SuperConfig
from dbtrain.training import step as steps
from dbtrain.training.bank import Bank, Item
from dbtrain.values import Batch, Role
from dbtrain_kernels.reference import TARGETS
from tests.kit.made_photos import make_samples

CASCADES = [name for name in FAMILIES if FAMILIES[name].guide]
PIXELS = [name for name in FAMILIES if name.startswith("if_")]
CAPTIONS = ["a photo of a Dog", "a cat in the snow"]
LOW, KEY = 16, (11, 12)


def model_of(name, folders):
    family = FAMILIES[name]
    return family, load_models(family, ModelConfig(family=name, path=str(folders[name])))


@pytest.fixture(scope="module", params=CASCADES)
def loaded(request, model_folders):
    """(family, models) in float32; tests leave them as they are."""
    return model_of(request.param, model_folders)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def settings(level=0, highest=None):
    told = SuperConfig(level=level, level_highest=highest)
    return RunConfig(data=DataConfig(resolution=4 * LOW), super=told)


@torch.no_grad()
def step_of(family, models, config, key=KEY, captions=CAPTIONS):
    told = family.encode_tokens(models.text_encoders, family.tokenize(models, captions))
    return steps.TrainingStep(family, models, config, key, told, 0.0)


def batch_of(family, count=2, seed=0):
    """Samples of random pictures, large and small."""
    low, zeros = noise(count, 3, LOW, LOW, seed=seed).clamp(-1, 1), torch.zeros(count, dtype=torch.long)
    large = noise(count, family.codec.channels, *[4 * LOW // family.codec.cell] * 2, seed=seed + 1)
    return Batch(exactly(large), torch.arange(count), zeros, torch.arange(count), torch.zeros(count, 6), low_BCHW=low)


@pytest.fixture
def seen(loaded, monkeypatch):
    """What the U-Net is called with, call by call."""
    calls, unet = [], loaded[1].denoiser
    forward = unet.forward

    def watched(sample, timestep, encoder_hidden_states, class_labels=None, **words):
        calls.append((sample, encoder_hidden_states, class_labels))
        return forward(sample, timestep, encoder_hidden_states, class_labels=class_labels, **words)

    monkeypatch.setattr(unet, "forward", watched)
    return calls


@pytest.mark.parametrize("level", [0, 50, 250])
@torch.no_grad()
def test_the_unet_is_shown_what_its_pipeline_shows_it(loaded, seen, level, monkeypatch):
    family, models = loaded
    drawn = []
    plain = steps.noising
    monkeypatch.setattr(steps, "noising", lambda *a, **b: drawn.append(plain(*a, **b)) or drawn[-1])
    batch = batch_of(family)
    step_of(family, models, settings(level))(batch, 5)
    image, guide = drawn
    pipeline = make_pipeline(family, models)
    first = [image.noisy, guide.noise]
    numbers = iter(first if family.guide.enlarged else first[::-1])
    module = sys.modules[type(pipeline).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **words: next(numbers).reshape(shape))
    sized = {"height": 4 * LOW, "width": 4 * LOW} if family.guide.enlarged else {}
    pipeline(
        prompt=CAPTIONS,
        image=batch.low_BCHW if family.guide.enlarged else list(batch.low_BCHW),
        num_inference_steps=1,
        noise_level=level,
        output_type="pt",
        **sized,
        **family.call(models, 1.0),
    )
    ours, theirs = seen
    assert ours[0].shape[1] == family.codec.channels + 3
    for name, mine, stock in zip(("input", "text", "level"), ours, theirs):
        # Equal to the bit on most processors; on some, loops over other shapes round a product and a sum together.
        assert mine.shape == stock.shape and (mine - stock).abs().max() <= 2**-21, name


@torch.no_grad()
def test_pictures_are_enlarged_at_the_level_that_was_trained(loaded, seen):
    """The pipelines' own defaults, 250 and 20, would hide what the small picture shows."""
    family, models = loaded
    told = settings(7, 20).model_copy(update={"sample": SampleConfig(steps=1, guidance=1.0)})
    small_ones = [Image.fromarray(np.full((LOW, LOW, 3), shade, np.uint8)) for shade in (0, 200)]
    pipeline = Chain(small_ones, (make_enlarger(family, models, told),))
    images = list(generate(pipeline, CAPTIONS, [1, 2], 4 * LOW, 1, 1.0))
    assert [image.size for image in images] == [(4 * LOW, 4 * LOW)] * 2
    ((shown, _, level),) = seen
    assert level.tolist() == [7, 7]
    assert shown[0, -3:].mean() < -0.8 and shown[1, -3:].mean() > 0.4, "each its own picture, behind x_t"


@pytest.mark.parametrize("name", PIXELS[1:])
@torch.no_grad()
def test_bicubic_guides_are_the_same_in_training_and_in_sampling(name, model_folders, monkeypatch):
    """PIL rounds twice to 8 bits, so a guide of the pipeline is within two of 255 shades. It also cuts overshoots off
    between its two passes: shades here are so far from black and white that there are none to cut."""
    family, models = model_of(name, model_folders)
    told = settings(0).model_copy(update={"super": SuperConfig(enlarge="bicubic"), "sample": SampleConfig(steps=1)})
    small = Image.fromarray(np.random.default_rng(0).integers(64, 192, (LOW, LOW, 3), dtype=np.uint8))
    low = to_pixels(np.asarray(small))[None]
    given = []
    enlarger = make_enlarger(family, models, told)

    def called(self, **call):
        given.append(call["image"])
        return SimpleNamespace(images=call["image"])

    monkeypatch.setattr(type(enlarger.pipeline), "__call__", called)
    list(generate(Chain([small], (enlarger,)), CAPTIONS[:1], [1], 4 * LOW, 1, 1.0))
    shown = to_pixels(np.asarray(given[0][0]))[None]
    ours = steps.enlarged(low, shown, "bicubic")
    assert shown.shape == ours.shape and (shown - ours).abs().max() < 2 / 127.5
    assert (steps.enlarged(low, shown, "aligned") - ours).abs().max() > 0.1


@torch.no_grad()
def test_levels_are_drawn_in_their_range(loaded):
    family, models = loaded
    wide = step_of(family, models, settings(3, 22))
    zeros = torch.zeros(400, dtype=torch.long)
    low = torch.zeros(400, 3, 1, 1)
    batch = Batch(exactly(low), zeros, zeros, torch.arange(400), torch.zeros(400, 6), low_BCHW=low)
    shown = wide.guided(batch, 0, torch.zeros(400, 3, 1, 1))
    assert set(shown.level_B.tolist()) == set(range(3, 23))
    sigma_B = wide.levels.sigma_S[shown.level_B]
    spread = (shown.guide_BCHW.flatten(1) / sigma_B[:, None]).std()
    assert abs(float(spread) - 1) < 0.1
    again = wide.guided(batch, 0, torch.zeros(400, 3, 1, 1))
    assert torch.equal(again.guide_BCHW, shown.guide_BCHW)
    assert not torch.equal(wide.guided(batch, 1, low).level_B, shown.level_B)


@torch.no_grad()
def test_the_guides_noise_is_not_the_pictures(loaded):
    """Two purposes share no counter: a model could read the answer off the guide."""
    family, models = loaded
    step = step_of(family, models, settings(250))
    batch = batch_of(family)
    eps = step.noised(batch, 3).noise[:, :3].flatten(1)
    grey = replace(batch, low_BCHW=torch.zeros_like(batch.low_BCHW))
    guide = step.guided(grey, 3, eps.view(2, 3, *[int((eps.shape[1] / 3) ** 0.5)] * 2)).guide_BCHW.flatten(1)
    assert abs(float(torch.corrcoef(torch.stack([eps.flatten(), guide.flatten()]))[0, 1])) < 0.05


def test_a_pack_is_each_subject_alone(loaded):
    """Three subjects, each with its own key, step and pictures; adapters on all targets, in float64."""
    from dbtrain.models.adapters import attach, detach, layers
    from tests.kit.family_facts import FACTS

    family, models = loaded
    facts = FACTS[family.name]
    try:
        models.denoiser.double()
        keys, at = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([7, 8, 90])
        batches = [batch_of(family, seed=10 * n) for n in range(3)]
        config = settings(0, 20)

        def gradients(subjects):
            attach(models.denoiser, facts.targets, len(subjects), 2, 2.0)
            for number, (_, layer) in enumerate(layers(models.denoiser)):
                for kind, parameter in enumerate((layer.down_NRD, layer.up_NDR)):
                    values = noise(3, *parameter.shape[1:], seed=2 * number + kind, dtype=torch.float64)
                    parameter.data = 0.2 * values[subjects]
                layer.double()
            prior = torch.zeros(len(subjects))
            step = step_of(family, models, config, keys[subjects])
            step.prior_weight = prior
            step.captions = type(step.captions)(step.captions.states_BTD.double())
            names = Batch.__dataclass_fields__
            joined = Batch(
                **{
                    name: torch.cat([getattr(batches[n], name) for n in subjects])
                    for name in names
                    if getattr(batches[0], name) is not None
                }
            )
            rows = torch.arange(len(subjects)).repeat_interleave(2)
            joined = replace(
                joined, subject_B=rows, images_BCHW=joined.images_BCHW.double(), low_BCHW=joined.low_BCHW.double()
            )
            step(joined, at[subjects]).loss.backward()
            found = {
                (path, kind): parameter.grad
                for path, layer in layers(models.denoiser)
                for kind, parameter in (("down", layer.down_NRD), ("up", layer.up_NDR))
            }
            detach(models.denoiser)
            return found

        pack = gradients([0, 1, 2])
        assert pack and all(grad.any() for grad in pack.values())
        for subject in range(3):
            for name, grad in gradients([subject]).items():
                assert (pack[name][subject] - grad[0]).abs().max() < 1e-12 * max(1.0, float(grad.abs().max())), name
    finally:
        detach(models.denoiser)
        models.denoiser.float()


@pytest.mark.parametrize("name", [*PIXELS, "x4_upscaler"])
@torch.no_grad()
def test_a_model_that_knows_the_picture_draws_it(name, model_folders, monkeypatch):
    """Through the pipelines' own schedulers: the table, and what a prediction means (eps, v) are theirs."""
    family, models = model_of(name, model_folders)
    side = LOW if family.guide is None else 4 * LOW // family.codec.cell
    clean = noise(2, family.codec.channels, side, side, seed=1, dtype=torch.float64).clamp(-0.9, 0.9)
    schedule, made = models.schedule, []

    def forward(sample, timestep, **words):
        x_t = sample[:, : clean.shape[1]].double()
        alpha, sigma = schedule.alpha_S[int(timestep)], schedule.sigma_S[int(timestep)]
        told = TARGETS[schedule.parameterization](clean, (x_t - alpha * clean) / sigma, alpha, sigma).to(sample.dtype)
        return (torch.cat([told, torch.zeros_like(told)], 1) if models.vae is None else told,)

    monkeypatch.setattr(models.denoiser, "forward", forward)
    pipeline = make_pipeline(family, models)
    assert models.vae is not None or pipeline.scheduler.config.variance_type == "fixed_small", "no variance is learnt"
    words = {"image": list(noise(2, 3, LOW, LOW, seed=2).clamp(0, 1)), "noise_level": 0} if family.guide else {}
    words |= {} if name == "x4_upscaler" else {"height": side, "width": side}
    pipeline(
        prompt=CAPTIONS,
        num_inference_steps=3,
        output_type="latent" if models.vae is not None else "pt",
        callback=lambda step, time, values: made.append(values),
        **words,
        **family.call(models, 1.0),
    )
    assert (made[-1] - clean).abs().max() < 2e-6


@torch.no_grad()
def test_tables_are_the_schedulers_own(loaded):
    _, models = loaded
    x, eps = noise(1000, 1, 1, 1), noise(1000, 1, 1, 1, seed=1)
    times = torch.arange(1000)
    for table, scheduler in ((models.schedule, models.scheduler), (models.levels, models.guide_scheduler)):
        alpha, sigma = (values.view(-1, 1, 1, 1).float() for values in (table.alpha_S, table.sigma_S))
        assert (alpha * x + sigma * eps - scheduler.add_noise(x, eps, times)).abs().max() < 1e-6
    if models.schedule.parameterization == "v_prediction":
        alpha, sigma = (v.view(-1, 1, 1, 1).float() for v in (models.schedule.alpha_S, models.schedule.sigma_S))
        ours = TARGETS["v_prediction"](x, eps, alpha, sigma)
        assert (ours - models.scheduler.get_velocity(x, eps, times)).abs().max() < 1e-6


@pytest.mark.parametrize("crop, flip", [("random", True), ("center", False)])
def test_small_and_large_pictures_are_of_one_crop(crop, flip):
    items = {Role.INSTANCE: [Item(sample, "a photo") for sample in make_samples(1, 3)]}
    data = DataConfig(resolution=64, crop=crop, flip=flip)
    bank = Bank(items, data, 0, "rex", 4, 1, low=LOW)
    if crop == "center":
        bank.cache(Role.INSTANCE, bank.kinds[0], FAMILIES["if_stage2"].codec, None, "cpu")
        bank.reduce(Role.INSTANCE, bank.kinds[0])
    for step in range(4):
        batch = bank.draw(step, range(4))
        for large, low in zip(batch.images_BCHW[:, :3], batch.low_BCHW):
            array = ((large + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            assert torch.equal(to_pixels(square(Image.fromarray(np.ascontiguousarray(array)), LOW)), low)
    assert len({batch.low_BCHW.sum().item() for batch in (bank.draw(step, [0]) for step in range(3))}) > 1


@pytest.mark.parametrize("name", PIXELS)
def test_moments_of_pixels_are_the_pixels(name):
    codec, pixels = FAMILIES[name].codec, noise(2, 3, 8, 8)
    mean, logvar = codec.encode(None, pixels).chunk(2, 1)
    assert torch.equal(mean, pixels) and torch.isneginf(logvar).all() and codec.scale(None) == (1.0, 0.0)
    assert codec.is_encoded(codec.encode(None, pixels))
