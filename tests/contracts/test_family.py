"""Contract of a family on a random model of its real layout: load, tell, encode, denoise."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.models import fused_rotary
from dbtrain.models.attention import MAY_RUN, Ran, attention_layers, engage_attention
from dbtrain.models.fused_pointwise import fuse_pointwise
from dbtrain.models.load import base_digest, digests_of, load_models
from dbtrain.models.sampling import make_pipeline
from dbtrain.settings.config import ModelConfig
from dbtrain.values import Conditioning
from dbtrain_kernels.rotary import rotary
from tests.kit.family_facts import FACTS, batch_of, real_states, shown
from tests.kit.latents import sample_latents

CAPTIONS = ["a photo of a dog", "a much longer caption " + "very " * 100]


LENGTHS = {
    "sd3": 256, "qwen_image": 546, "krea2": 554, "if_stage1": 77, "if_stage2": 77, "lumina2": 256, "sana": 1328,
    "ideogram4": 1024,
}  # fmt: skip
"""Tokens of encoders that are no CLIP, by family; the tests' tokenizer reads Krea 2's last 5 as 13, and
Sana's instruction as 1030."""


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, model_folders):
    """(family, its random models, their folder); tests leave them as they are."""
    family = FAMILIES[request.param]
    folder = model_folders[family.name]
    return family, load_models(family, ModelConfig(family=family.name, path=str(folder))), folder


@torch.no_grad()
def conditioning(family, models, captions=CAPTIONS):
    return family.encode_tokens(models.text_encoders, family.tokenize(models, captions))


def test_everything_is_loaded_frozen_in_fp32_and_evaluation_mode(loaded):
    family, models, _ = loaded
    components = models.components(family.denoiser)
    assert set(components) == {family.denoiser, *family.text_encoders}
    for module in (*components.values(), *filter(None, [models.vae])):
        assert not module.training
        for param in module.parameters():
            assert not param.requires_grad and param.dtype == torch.float32


def test_schedule_is_the_schedulers(loaded):
    family, models, _ = loaded
    if models.schedule.parameterization == "flow":
        assert torch.equal(models.schedule.sigma_S * 1000, torch.arange(1, 1001).double())
        assert torch.equal(models.schedule.alpha_S, 1 - models.schedule.sigma_S)
        return
    wanted = "v_prediction" if family.name in ("x4_upscaler", "playground") else "epsilon"
    assert models.schedule.parameterization == wanted
    if not family.edm:  # `test_playground.py` has its table
        assert torch.equal(models.schedule.alpha_S, models.scheduler.alphas_cumprod.double().sqrt())


def test_tokens_fill_the_encoders_length(loaded):
    family, models, _ = loaded
    tokens = family.tokenize(models, CAPTIONS)
    assert len(tokens) >= len(family.text_encoders)
    for name, ids in zip(models.tokenizers, tokens):
        tokenizer = models.tokenizers[name]
        clip = type(models.text_encoders[name]).__name__.startswith("CLIP")
        assert ids.shape == (2, tokenizer.model_max_length if clip else LENGTHS.get(family.name, 512))
        assert torch.isin(ids[0], torch.tensor([tokenizer.eos_token_id, tokenizer.pad_token_id])).any()
        assert not clip or ids[1, -1] == tokenizer.eos_token_id  # cut, but ended


def test_conditioning_is_what_the_stock_pipeline_feeds(loaded):
    """diffusers' own encode_prompt is the oracle, caption by caption, to the bit where both pad alike."""
    family, models, _ = loaded
    pipeline = make_pipeline(family, models)
    for row, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            states, pooled = FACTS[family.name].text(pipeline, [caption])
        ours = conditioning(family, models, [caption])
        far = (real_states(ours, states.shape[1]) - states).abs().max()
        assert far <= (0 if ours.mask_BT is None else 1e-6), row  # padded to another length: rounding differs
        assert (ours.pooled_BD is None) == (pooled is None)
        assert pooled is None or torch.equal(ours.pooled_BD, pooled)


def test_conditioning_does_not_depend_on_its_batch(loaded):
    family, models, _ = loaded
    both = conditioning(family, models)
    assert isinstance(both, Conditioning)
    for row, caption in enumerate(CAPTIONS):
        alone = conditioning(family, models, [caption])
        assert torch.allclose(both[row : row + 1].states_BTD, alone.states_BTD, rtol=0, atol=1e-5)
    assert not torch.allclose(both.states_BTD[0], both.states_BTD[1])


def test_moments_are_the_vaes_and_latents_its_samples(loaded):
    family, models, _ = loaded
    if FACTS[family.name].mean or FACTS[family.name].film or family.edm:
        pytest.skip("its latents have other statistics than a scale: their pictures are drawn elsewhere")
    if models.vae is None:
        pytest.skip("it has no autoencoder: `test_super.py` looks at its pixels")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shape = (2, family.codec.channels, *(32 // FACTS[family.name].side,) * 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        moments, posterior = family.codec.encode(models.vae, pixels), models.vae.encode(pixels).latent_dist
    assert moments.shape == (2, 2 * family.codec.channels, *shape[2:])
    assert family.codec.is_encoded(moments) and not family.codec.is_encoded(pixels)
    ours = sample_latents(family.codec, models.vae, moments, noise)
    scale, shift = models.vae.config.scaling_factor, models.vae.config.shift_factor or 0.0
    theirs = (posterior.mean + posterior.std * noise - shift) * scale
    assert torch.allclose(ours, theirs, rtol=4 * 2.0**-23, atol=1e-6 if shift else 1e-7)
    at_mean = sample_latents(family.codec, models.vae, moments, torch.zeros_like(noise))
    assert torch.equal(at_mean, (posterior.mode() - shift) * scale)


@torch.no_grad()
def test_denoise_takes_all_it_is_told(loaded):
    family, models, _ = loaded
    x = torch.randn(2, family.codec.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = shown(family, batch_of(2), x)
    time, told = torch.tensor([10, 700]), conditioning(family, models)
    plain = family.denoise(models.denoiser, x, time, told, batch)
    assert plain.shape == x.shape and torch.isfinite(plain).all()
    others = [
        family.denoise(models.denoiser, x, time.flip(0), told, batch),
        family.denoise(models.denoiser, x, time, told[torch.tensor([1, 0])], batch),
    ]
    if family.name == "sdxl":
        others.append(family.denoise(models.denoiser, x, time, told, batch_of(2, 64, 64)))
    if family.guide is not None:
        others.append(family.denoise(models.denoiser, x, time, told, replace(batch, level_B=batch.level_B + 30)))
        others.append(family.denoise(models.denoiser, x, time, told, replace(batch, guide_BCHW=batch.guide_BCHW / 2)))
    if told.pooled_BD is not None:
        swapped = Conditioning(told.states_BTD, told.pooled_BD.flip(0))
        others.append(family.denoise(models.denoiser, x, time, swapped, batch))
    assert not any(torch.equal(plain, other) for other in others)


@pytest.fixture
def unrounded(monkeypatch):
    """Models of diffusers that cast to fp32 inside stay in float64."""
    to = torch.Tensor.to

    def cast(self, *args, **named):
        return self if self.dtype == torch.float64 and torch.float32 in args else to(self, *args, **named)

    monkeypatch.setattr(torch.Tensor, "to", cast)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: cast(self, torch.float32))


ROTARY = {"flux", "flux2", "flux2_klein", "chroma", "krea2", "qwen_image", "zimage", "lumina2", "ideogram4"}
"""Families whose transformers tell places by a rotary embedding."""


def test_fused_gates_norms_and_embeddings_change_no_number(loaded, unrounded, monkeypatch):
    """Output and gradient in float64; every attention that is told of places takes the fused way."""
    family, models, _ = loaded
    x = torch.randn(2, family.codec.channels, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    told = conditioning(family, models, ["a dog", "a cat"])
    mask = told.mask_BT if told.mask_BT is None else told.mask_BT[:, :40]
    pooled = None if told.pooled_BD is None else told.pooled_BD.double()
    told = replace(told, states_BTD=told.states_BTD[:, :40].double(), mask_BT=mask, pooled_BD=pooled)
    seen = (torch.tensor([10, 700]), told, shown(family, batch_of(2), x))
    plain = copy.deepcopy(models.denoiser).double()
    fused, results, turned = copy.deepcopy(plain), [], []
    monkeypatch.setattr(fused_rotary, "rotary", lambda *args: turned.append(1) or rotary(*args))
    fuse_pointwise(fused)
    assert [*fused.state_dict()] == [*plain.state_dict()]
    for denoiser in (plain, fused):
        assert not turned
        given = x.clone().requires_grad_()
        output = family.denoise(denoiser, given, *seen)
        results.append([output, *torch.autograd.grad(output.square().sum(), given)])
    for want, got in zip(*results):
        assert got.dtype == torch.float64 and (got - want).norm() < 1e-12 * want.norm()
    apart = family.name == "krea2"  # its text's own layers know no places
    layers = [layer for layer in attention_layers(fused).values() if not apart or layer.num_kv_heads < layer.num_heads]
    assert (len(turned) >= 2 * len(layers)) == (family.name in ROTARY)


def test_digest_names_the_weights(loaded, tmp_path):
    _, models, folder = loaded
    assert models.digests == digests_of(str(folder)) and len(models.digests) >= 3
    before = base_digest(models)
    models.digests = {**models.digests, "unet/x.safetensors": "0"}
    assert base_digest(models) != before
    models.digests = digests_of(str(folder))


def test_regions_are_blocks_of_the_denoiser(loaded):
    family, models, _ = loaded
    kinds = [type(module).__name__ for module in models.denoiser.modules()]
    assert family.regions and all(kinds.count(region) > 1 for region in family.regions)


@torch.no_grad()
def test_the_attention_that_is_asked_for_runs_in_every_layer_of_this_model_alone(loaded):
    """Told by the operators. diffusers' own setter changes the default of every model, and some models ignore it."""
    family, models, _ = loaded
    x = torch.randn(2, family.codec.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    told = conditioning(family, models, ["a dog", "a cat"])
    mask = told.mask_BT if told.mask_BT is None else told.mask_BT[:, :40]
    told = replace(told, states_BTD=told.states_BTD[:, :40], mask_BT=mask)  # most of the time would go there
    seen = (torch.tensor([10, 700]), told, shown(family, batch_of(2), x))
    drawn, default = {}, _AttentionBackendRegistry.get_active_backend()
    classes = [type(layer.processor) for layer in attention_layers(models.denoiser).values()]
    try:
        for choice in ("math", "flash", "sdpa"):
            engaged = engage_attention(models.denoiser, choice, "cpu")
            pools = family.name.startswith("if_") and choice == "flash"  # its text, by a softmax of its own
            found = pytest.raises(ConfigError, match="asked for flash, but flash and math runs")
            with Ran() as ran, found if pools else nullcontext(), engaged.watched():
                drawn[choice] = family.denoise(models.denoiser, x, *seen)
            assert pools or (ran.kernels and ran.kernels <= MAY_RUN[choice])
            assert _AttentionBackendRegistry.get_active_backend() == default
    finally:
        engage_attention(models.denoiser, "sdpa", "cpu")
    assert [type(layer.processor) for layer in attention_layers(models.denoiser).values()] == classes
    for other in (drawn["flash"], drawn["sdpa"]):  # float32 softmaxes in another order
        assert (drawn["math"] - other).abs().max() < 1e-4 * drawn["math"].abs().max()
