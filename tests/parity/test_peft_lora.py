"""Fifty steps of a LoRA against PEFT's layers, torch's AdamW and torch's clip_grad_norm_, on the same draws."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model

from dbtrain.engines.engine import plan_batches
from dbtrain.engines.zero import ZeroEngine
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import layers
from dbtrain.models.load import load_models
from dbtrain.randomness import Purpose, stream_key, uniforms
from dbtrain.settings.config import LoraConfig as OurLora
from dbtrain.settings.config import ModelConfig, PriorConfig, RunConfig, TrainConfig
from dbtrain.training.step import TrainingStep
from dbtrain.training.trainables import make_trainable
from dbtrain.values import Batch, Role
from tests.kit.normals import normals

STEPS, EARLY, BATCH, LAMBDA, CLIP, KEY = 50, 10, 2, 0.5, 0.02, stream_key(3, "rex")
CLOSE = 1e-5
"""Relative difference of all weights after 50 steps in float32."""


def config_of(folder):
    return RunConfig(
        seed=3,
        model=ModelConfig(path=str(folder)),
        train=TrainConfig(batch=BATCH, lr=1e-3, clip_norm=CLIP, steps=STEPS, weight_decay=0.02),
        lora=OurLora(rank=4, alpha=2.0),
        prior=PriorConfig(weight=LAMBDA),
    )


@pytest.fixture(scope="module")
def start(sd_folder):
    """(configuration, base models, captions, one batch of fixed images)."""
    config, family = config_of(sd_folder), FAMILIES["sd"]
    models = load_models(family, config.model)
    with torch.no_grad():
        told = family.encode_tokens(
            models.text_encoders, family.tokenize(models, ["a photo of srx dog", "a photo of a dog"])
        )
    moments = torch.randn(2 * BATCH, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    role = torch.tensor([Role.INSTANCE] * BATCH + [Role.PRIOR] * BATCH)
    batch = Batch(moments, role.clone(), role, torch.arange(2 * BATCH), torch.zeros(2 * BATCH, 6))
    return config, models, told, batch


def with_unet(models):
    own = copy.copy(models)
    own.denoiser = copy.deepcopy(models.denoiser)
    return own


def train_ours(start, world):
    """({path: (A, B)} at the start, after 10 and 50 steps of the real engine; the gradient norms before clipping)."""
    config, models, told, batch = start
    models = with_unet(models)
    groups = make_trainable(FAMILIES["sd"], models, config, "rex")
    first = matrices(models.denoiser)
    module = TrainingStep(FAMILIES["sd"], models, config, KEY, told)
    engine = ZeroEngine(module, groups, config, plan_batches(BATCH, None, world.size), world)
    norms, early = [], None
    try:
        for step in range(STEPS):
            early = matrices(models.denoiser) if step == EARLY else early
            engine.backward(engine(batch, step).loss)
            norms.append(engine.step(1.0))
        return first, early, matrices(models.denoiser), norms
    finally:
        engine.close()


def matrices(unet):
    return {path: (la.down_NRD[0].detach().clone(), la.up_NDR[0].detach().clone()) for path, la in layers(unet)}


def train_peft(start, first, steps=STEPS, clip=CLIP, scale_prior=LAMBDA, key=KEY, lr=1e-3):
    """The same run with nothing of ours but the names of the random numbers; alpha is half the rank."""
    _, models, told, batch = start
    unet = copy.deepcopy(models.denoiser).requires_grad_(False).train()
    rank = len(next(iter(first.values()))[0])
    lora = LoraConfig(r=rank, lora_alpha=rank / 2, target_modules=list(first))
    unet = inject_adapter_in_model(lora, unet)
    params = {}
    with torch.no_grad():
        for path, (down, up) in first.items():
            layer = unet.get_submodule(path)
            params[path] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            params[path][0].copy_(down)
            params[path][1].copy_(up)
    flat = [p for p in unet.parameters() if p.requires_grad]
    assert len(flat) == 2 * len(first)
    optimizer = torch.optim.AdamW(flat, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02)
    peer = DDPMScheduler.from_config(models.scheduler.config)
    states = told.states_BTD[batch.caption_B]
    mean, logvar = batch.images_BCHW.chunk(2, 1)
    for step in range(steps):
        posterior = normals(key, Purpose.POSTERIOR, step, batch.slot_B, (4, 16, 16))
        latents = (mean + torch.exp(0.5 * logvar) * posterior) * models.vae.config.scaling_factor
        noise = normals(key, Purpose.NOISE, step, batch.slot_B, (4, 16, 16))
        timesteps = (uniforms(key, Purpose.TIMESTEP, step, batch.slot_B) * 1000).long()
        prediction = unet(peer.add_noise(latents, noise, timesteps), timesteps, states, return_dict=False)[0]
        instance, prior = prediction.chunk(2)
        wanted, wanted_prior = noise.chunk(2)
        loss = F.mse_loss(instance, wanted) + scale_prior * F.mse_loss(prior, wanted_prior)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flat, clip)
        optimizer.step()
        optimizer.zero_grad()
    return {path: tuple(weight.detach() for weight in pair) for path, pair in params.items()}


def difference(ours, theirs, first):
    """(relative to the weights, relative to how far the weights moved): the second cannot hide behind the start."""
    mine, other, begin = (
        torch.cat([m.flatten() for path in first for m in each[path]]).double() for each in (ours, theirs, first)
    )
    gap = (mine - other).norm()
    return (gap / other.norm()).item(), (gap / (other - begin).norm()).item()


def test_fifty_steps_equal_peft_and_torch(start, world):
    first, early, ours, norms = train_ours(start, world)
    assert min(norms) > CLIP  # clipping bites in every step
    weights, moves = difference(ours, train_peft(start, first), first)
    assert weights < CLOSE and moves < 10 * CLOSE
    assert difference(first, ours, first)[0] > 1e-2  # and 50 steps went somewhere
    for wrong in ({"steps": EARLY - 1}, {"steps": EARLY, "clip": 1e9}, {"steps": EARLY, "scale_prior": 1.0}):
        assert difference(early, train_peft(start, first, **wrong), first)[0] > 10 * CLOSE, wrong
