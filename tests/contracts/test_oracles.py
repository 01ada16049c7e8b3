"""Oracles of a family: its stock pipeline's own calls, models that know the answer, each subject of a pack alone."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dbtrain.families import FAMILIES, flow
from dbtrain.models.adapters import adapter, attach, detach, layers, matching_layers
from dbtrain.models.family import encode_texts
from dbtrain.models.load import load_models
from dbtrain.models.sampling import Chain, generate, make_enlarger, make_pipeline
from dbtrain.models.texts import Texts
from dbtrain.results.publish import publish_lora
from dbtrain.settings.config import DataConfig, ModelConfig, RunConfig, SampleConfig
from dbtrain.training.trainables import RECOMPUTED
from tests.kit.adapter_rows import read_rows
from tests.kit.family_facts import FACTS, batch_of, shown

CAPTIONS = ["a photo of a dog", "a photo of a cat in the snow"]
FLOWS = [name for name in FAMILIES if FAMILIES[name].schedule is flow.schedule]
ENLARGING = RunConfig(data=DataConfig(resolution=64), sample=SampleConfig(steps=2, guidance=1.0))
SIZES = pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "two to three"])


def model_of(name, folders):
    family = FAMILIES[name]
    return family, FACTS[name], load_models(family, ModelConfig(family=name, path=str(folders[name])))


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, model_folders):
    """(family, facts, models) in float32; tests leave them as they are."""
    return model_of(request.param, model_folders)


def in_float64(name, folders):
    family, facts, models = model_of(name, folders)
    parts = (*models.components(family.denoiser).values(), *models.companions.values(), *filter(None, [models.vae]))
    for module in parts:
        module.double()
    return family, facts, models


@pytest.fixture(scope="module")
def doubles(model_folders):
    """`in_float64` by name, each made once."""
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, in_float64(name, model_folders))


@pytest.fixture
def exact(request, doubles):
    """(family, facts, models) in float64; tests leave them as they are."""
    return doubles(request.param)


ALL = pytest.mark.parametrize("exact", FAMILIES, indirect=True)
STOCK = pytest.mark.parametrize("exact", [name for name in FAMILIES if FACTS[name].stock], indirect=True)
FLOW = pytest.mark.parametrize("exact", FLOWS, indirect=True)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def told(family, models, captions=CAPTIONS):
    return family.encode_tokens(models.text_encoders, family.tokenize(models, captions))


def latents(facts, size, count=2, channels=4, **options):
    return noise(count, channels, size[0] // facts.side, size[1] // facts.side, **options)


def drawn(family, models, facts, start, size, steps, captions=CAPTIONS, **options):
    """What the stock pipeline makes of latents, without guidance."""
    return make_pipeline(family, models)(
        prompt=list(captions),
        latents=facts.start(start),
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        **family.call(models, 1.0),
        **options,
    ).images


@STOCK
@SIZES
@torch.no_grad()
def test_denoise_is_the_pipelines_own_call(exact, size):
    family, facts, models = exact
    start = latents(facts, size, channels=family.codec.channels).float().double()  # some pipelines hold float32
    before, after = [], []

    def step_begin(module, places, words):
        before.append(facts.heard(places, words)[0].clone())

    def step_end(pipeline, i, time, values):
        times.append(time)
        return {}

    times, (height, width) = [], start.shape[-2:]
    listen = models.denoiser.register_forward_pre_hook(step_begin, with_kwargs=True)
    watch = models.denoiser.register_forward_hook(lambda module, places, output: after.append(output[0]))
    drawn(family, models, facts, start, size, 4, output_type="latent", callback_on_step_end=step_end)
    watch.remove(), listen.remove()
    assert len(after) == 4
    conditioning = told(family, models)
    for native, time, theirs in zip(before, times, after):
        x_t = facts.ours(native, height, width).double()
        ours = family.denoise(models.denoiser, x_t, time.expand(2), conditioning, batch_of(2, *size))
        assert (ours - facts.said(theirs, height, width)).abs().max() <= facts.tolerance


@torch.no_grad()
def times_told(family, facts, models, start):
    """The line from the denoiser's own argument of time back to t: two calls of `denoise` show it."""
    seen, conditioning = [], told(family, models)

    def call(*places, **words):
        seen.append(facts.heard(places, words)[1])
        return facts.says(torch.zeros_like(start))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.denoiser, "forward", call)
        for time in (0.0, 1000.0):
            family.denoise(models.denoiser, start, torch.tensor([time, time]), conditioning, batch_of(2))
    low, high = (time.double() for time in seen)
    return lambda time: (time.double() - low[: len(time)]) / (high - low)[: len(time)] * 1000


SEES = ["zimage", "qwen_image", "krea2", "lumina2", "sana", "ideogram4"]
MASKED = pytest.mark.parametrize("exact", SEES, indirect=True)
"""Families whose denoiser does not see padding. Chroma's has a mask that hides nothing."""


@MASKED
@torch.no_grad()
def test_padding_changes_nothing(exact):
    family, facts, models = exact
    plain, x_t = told(family, models), latents(facts, (64, 64), channels=family.codec.channels)

    def predict(states_BTD, mask_BT):
        conditioning = replace(plain, states_BTD=states_BTD, mask_BT=mask_BT)
        return family.denoise(models.denoiser, x_t, torch.tensor([3, 777]), conditioning, batch_of(2))

    states, mask = plain.states_BTD, plain.mask_BT
    assert not mask.all(1).any() and mask.any(1).all()
    want = predict(states, mask)
    assert (predict(states.where(mask[..., None], 7.0), mask) - want).abs().max() < 1e-12
    longer = predict(F.pad(states, (0, 0, 0, 8), value=7.0), F.pad(mask, (0, 8)))
    assert (longer - want).abs().max() < 1e-12


@FLOW
@pytest.mark.parametrize(("knows", "size"), [("the picture and the noise", (64, 64)), ("the time", (64, 96))])
@torch.no_grad()
def test_a_model_that_knows_the_picture_draws_it(exact, size, knows, monkeypatch):
    """The codec's latents, the sign and scale of the velocity and the sense of time agree with the pipeline's.

    Noise levels depend on the picture's shape, but a model that knows the noise asks for none: one shape for each."""
    family, facts, models = exact
    pixels = (noise(2, 3, *size, seed=1) / 3).clamp(-1, 1)
    encoded = models.vae.encode(pixels[:, :, None] if facts.film else pixels)
    posterior = getattr(encoded, "latent_dist", None)
    raw = posterior.mean if posterior else encoded.latent
    if not facts.mean:
        raw = raw + posterior.std * noise(*raw.shape, seed=2)
    mean, logvar = family.codec.encode(models.vae, pixels).double().chunk(2, 1)
    clean = mean + torch.exp(0.5 * logvar) * noise(*mean.shape, seed=2)
    eps, (height, width) = noise(*clean.shape, seed=3), clean.shape[-2:]
    time_of = times_told(family, facts, models, eps)

    def forward(*places, **words):
        if knows != "the time":
            return facts.says(eps - clean)
        x_t, time = facts.heard(places, words)
        sigma_B = (time_of(time) / 1000).view(-1, 1, 1, 1)
        return facts.says((facts.ours(x_t, height, width) - clean) / sigma_B)

    monkeypatch.setattr(models.denoiser, "forward", forward)
    for steps in (facts.least, 3):
        start = facts.first * eps + (1 - facts.first) * clean
        image = drawn(family, models, facts, start, size, steps, output_type="pt")
        want = (models.vae.decode(raw, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        want = want[:, :, 0] if facts.film else want
        assert (image - want).abs().max() < 1e-5  # the scheduler's noise levels are float32


def random_stack(family, denoiser, subjects, only=None):
    """Adapters of random numbers on every layer of a denoiser that can have one; `only`: of this subject alone."""
    mixing = matching_layers(denoiser, family.unstackable)
    targets = [path for path in matching_layers(denoiser, ["*"]) if path not in mixing]
    attach(denoiser, targets, 1 if only is not None else subjects, 2, 3.0)
    for number, (_, layer) in enumerate(layers(denoiser)):
        layer.double()
        for kind, parameter in enumerate((layer.down_NRD, layer.up_NDR)):
            values = noise(subjects, *parameter.shape[1:], seed=2 * number + kind) * 0.2
            parameter.data = values if only is None else values[only : only + 1]


def shortened(conditioning):
    """The first tokens alone: gradients need no whole caption, and most of the time would go there."""
    mask = conditioning.mask_BT
    return replace(
        conditioning, states_BTD=conditioning.states_BTD[:, :40], mask_BT=None if mask is None else mask[:, :40]
    )


SIX = [*CAPTIONS, "a dog", "a cat", "the snow", "a photo"]


@pytest.fixture(scope="module")
def encoded_captions():
    return {}


@pytest.fixture
def captions(exact, encoded_captions):
    """Six encoded captions, shortened, made once for each family."""
    family, _, models = exact
    if family.name not in encoded_captions:
        encoded_captions[family.name] = shortened(told(family, models, SIX))
    return encoded_captions[family.name]


def gradients(family, facts, models, captions, samples, rows):
    """Gradients of every adapter, [N, ...] by name, of a loss of these samples' predictions."""
    count = len(samples)
    x_t = latents(facts, (64, 64), 6, family.codec.channels)[samples]
    goal = latents(facts, (64, 64), 6, family.codec.channels, seed=1)[samples]
    time_B = torch.tensor([3, 150, 333, 500, 777, 990])[samples]
    batch = shown(family, batch_of(count), x_t, samples)
    prediction = family.denoise(models.denoiser, x_t, time_B, captions[samples], batch)
    ((prediction - goal) ** 2).mean((1, 2, 3)).sum().backward()
    found = {}
    for path, layer in layers(models.denoiser):
        for kind, parameter in (("down", layer.down_NRD), ("up", layer.up_NDR)):
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert len(grad) == rows
            found[path, kind] = grad
    return found


@ALL
def test_a_pack_is_each_subject_alone(exact, captions):
    """Adapters on every layer that can have one, three subjects of two samples."""
    family, facts, models = exact
    try:
        random_stack(family, models.denoiser, 3)
        pack = gradients(family, facts, models, captions, torch.arange(6), 3)
        detach(models.denoiser)
        for subject in range(3):
            random_stack(family, models.denoiser, 3, subject)
            alone = gradients(family, facts, models, captions, torch.arange(6)[2 * subject : 2 * subject + 2], 1)
            for name, grad in alone.items():
                assert (pack[name][subject] - grad[0]).abs().max() <= 1e-12 * max(1.0, float(grad.abs().max())), name
            detach(models.denoiser)
    finally:
        detach(models.denoiser)
    assert {path for (path, _), grad in pack.items() if not grad.any()} == facts.idle


@ALL
def test_recomputed_blocks_give_the_same_gradients(exact, captions):
    family, facts, models = exact
    blocks = []

    def counted(*places, **words):
        blocks.append(places[0])
        return RECOMPUTED(*places, **words)

    try:
        random_stack(family, models.denoiser, 1)
        models.denoiser.train()
        plain = gradients(family, facts, models, captions, torch.arange(2), 1)
        models.denoiser.zero_grad()
        family.recompute(models.denoiser, counted)
        again = gradients(family, facts, models, captions, torch.arange(2), 1)
    finally:
        models.denoiser.disable_gradient_checkpointing()
        for module in models.denoiser.modules():
            vars(module).pop("forward", None)
        models.denoiser.eval()
        detach(models.denoiser)
    assert len(blocks) > 1 and all(torch.equal(plain[name], again[name]) for name in plain)


def one_matrix_is_a_batch(weights):
    """Whether this processor rounds the products of a batch of one matrix, as stacks have them, as it does those of the
    matrix, as PEFT has them. Some do not, by the shapes."""
    pairs = [pair for matrices in weights.matrices.values() for pair in matrices.values()]
    inputs = [(noise(64, down.shape[1], dtype=torch.float32), down, up) for down, up in pairs]
    return all(((x[None] @ down.mT[None]) @ up.mT[None])[0].equal(F.linear(F.linear(x, down), up))
               for x, down, up in inputs)  # fmt: skip


@torch.no_grad()
def test_diffusers_predicts_alike_from_a_published_adapter(loaded, tmp_path):
    """Of twice the rank as alpha; `test_publish.py` has others."""
    family, facts, models = loaded
    alpha = 8.0
    x_t = latents(facts, (64, 64), 2, family.codec.channels, dtype=torch.float32)
    conditioning, time_B = told(family, models), torch.tensor([3, 777])

    def predict():
        return family.denoise(models.denoiser, x_t, time_B, conditioning, shown(family, batch_of(2), x_t))

    attach(models.denoiser, facts.targets, 1, 4, alpha)
    for number, (_, layer) in enumerate(layers(models.denoiser)):
        layer.down_NRD.data = noise(*layer.down_NRD.shape, seed=2 * number, dtype=torch.float32) * 0.1
        layer.up_NDR.data = noise(*layer.up_NDR.shape, seed=2 * number + 1, dtype=torch.float32) * 0.1
    weights = read_rows({family.denoiser: models.denoiser}, 0, alpha)
    detach(models.denoiser)
    publish_lora(tmp_path, weights, {"family": family.name}, kohya=False)
    plain = predict()
    with adapter(family, models, weights):
        ours = predict()
    pipeline = make_pipeline(family, models)
    pipeline.load_lora_weights(tmp_path)
    theirs = predict()
    pipeline.unload_lora_weights()
    # PEFT convolves where we multiply matrices, whose sums are in another order: 9e-7 with the 1x1 convolutions of
    # Stable Diffusion 1.
    assert (ours - theirs).abs().max() <= (2**-18 if weights.conv or not one_matrix_is_a_batch(weights) else 0.0)
    assert (ours - plain).abs().max() > 1e-3 and torch.equal(plain, predict())


def drawing(family, models, guidance=1.0):
    """What draws pictures: the family's pipeline; of one that enlarges, after two small pictures."""
    if family.guide is None:
        return make_pipeline(family, models)
    small = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in (60, 60)]
    enlarger = make_enlarger(family, models, ENLARGING)
    return Chain(small, (enlarger._replace(sample=enlarger.sample.model_copy(update={"guidance": guidance})),))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_encoded_prompts_draw_the_picture_of_the_texts(loaded, guidance):
    """Without text encoders, from prompts and what guidance leads away from, each encoded alone."""
    family, _, models = loaded
    texts = Texts(lambda: models.text_encoders, partial(encode_texts, family, models))
    apart = replace(models, text_encoders={}, texts=texts)
    ours, theirs = (
        np.stack(list(generate(drawing(family, one, guidance), CAPTIONS, [5, 6], 64, 2, guidance))).astype(int)
        for one in (apart, models)
    )
    assert np.abs(ours - theirs).max() <= 1
    assert len(apart.texts.kept) == 2 + (family.avoided(models, guidance) is not None)


def test_a_picture_alone_is_the_picture_of_its_batch(loaded):
    family, _, models = loaded
    pipeline = drawing(family, models)
    together = list(generate(pipeline, CAPTIONS, [5, 6], 64, 2, 1.0))
    for caption, seed, image in zip(CAPTIONS, (5, 6), together):
        (alone,) = generate(pipeline, [caption], [seed], 64, 2, 1.0)
        assert np.abs(np.asarray(alone, dtype=int) - np.asarray(image, dtype=int)).max() <= 1
