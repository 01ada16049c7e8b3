"""Loss and gradients of a real U-Net against the arithmetic of diffusers' train_dreambooth.py, with the same draws.

Written from the script's formulas, not copied: the peer chunks the batch, takes F.mse_loss of each half, and weighs the
instance half by Min-SNR when there is no prior. Where it is wrong (Min-SNR with prior: all weights meet half of the
errors, issue 5791) the reference is the paper's equation in float64 autograd. For v, the weight is that of diffusers'
train_text_to_image.py, min(snr, gamma)/(snr + 1), since train_dreambooth.py's + 1 belongs to no parameterization.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.randomness import Purpose, stream_key, uniforms
from dbtrain.settings.config import ModelConfig, ObjectiveConfig, PriorConfig, RunConfig, TrainConfig
from dbtrain.training.step import TrainingStep
from dbtrain.values import Batch, Role
from tests.kit.normals import normals

KEY, STEP, BATCH, LAMBDA, GAMMA = stream_key(5, "rex"), 2, 2, 0.7, 1.0
LOSS_CLOSE = 16 * 2.0**-23
"""float32: a mean of 1,024 squares, ten roundings deep, of numbers that a U-Net of 40 layers gives alike to the bit."""
GRAD_CLOSE = 2e-5
"""float32 backward of 40 layers in another batch order; measured below 2e-6."""


@pytest.fixture(scope="module")
def base(sd_folder):
    return load_models(FAMILIES["sd"], ModelConfig(path=str(sd_folder)))


def setting(base, prediction, prior, weighting):
    config = RunConfig(
        model=ModelConfig(parameterization=prediction),
        train=TrainConfig(batch=BATCH, method="full"),
        prior=PriorConfig(weight=LAMBDA if prior else 0),
        objective=ObjectiveConfig(weighting=weighting, snr_gamma=GAMMA),
    )
    models = copy.copy(base)
    models.denoiser = copy.deepcopy(base.denoiser).requires_grad_(True)
    models.schedule = copy.copy(base.schedule)
    object.__setattr__(models.schedule, "parameterization", prediction)
    with torch.no_grad():
        ids = FAMILIES["sd"].tokenize(base, ["a photo of a dog", "a photo of srx dog"])
        told = FAMILIES["sd"].encode_tokens(base.text_encoders, ids)
    count = 2 * BATCH if prior else BATCH
    moments = torch.randn(count, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    role = torch.tensor([Role.INSTANCE] * BATCH + [Role.PRIOR] * (count - BATCH))
    batch = Batch(moments, 1 - role, role, torch.arange(count), torch.zeros(count, 6))
    return TrainingStep(FAMILIES["sd"], models, config, KEY, told), batch, told.states_BTD[1 - role]


def draws(batch, scaling):
    mean, logvar = batch.images_BCHW.chunk(2, 1)
    posterior = normals(KEY, Purpose.POSTERIOR, STEP, batch.slot_B, (4, 16, 16))
    latents = (mean + torch.exp(0.5 * logvar) * posterior) * scaling
    noise = normals(KEY, Purpose.NOISE, STEP, batch.slot_B, (4, 16, 16))
    return latents, noise, (uniforms(KEY, Purpose.TIMESTEP, STEP, batch.slot_B) * 1000).long()


def predict(unet, peer, batch, states, scaling, dtype=torch.float32):
    """The peer's forward pass: (prediction, target, timesteps)."""
    latents, noise, timesteps = draws(batch, scaling)
    latents, noise, states = latents.to(dtype), noise.to(dtype), states.to(dtype)
    noisy = peer.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, states, return_dict=False)[0]
    is_eps = peer.config.prediction_type == "epsilon"
    return prediction, noise if is_eps else peer.get_velocity(latents, noise, timesteps), timesteps


def min_snr_weight(peer, timesteps):
    snr = compute_snr(peer, timesteps)
    clipped = torch.stack([snr, GAMMA * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    return clipped / (snr if peer.config.prediction_type == "epsilon" else snr + 1)


def diffusers_loss(peer, prediction, target, timesteps, prior, weighting):
    """train_dreambooth.py: MSE(instance), Min-SNR weighted or not, + lambda * MSE(prior)."""
    prior_loss = 0.0
    if prior:
        prediction, prediction_prior = torch.chunk(prediction, 2, dim=0)
        target, target_prior = torch.chunk(target, 2, dim=0)
        prior_loss = F.mse_loss(prediction_prior.float(), target_prior.float(), reduction="mean")
    if weighting == "none":
        loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
    else:
        loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=[1, 2, 3])
        loss = (loss * min_snr_weight(peer, timesteps)).mean()
    return loss + LAMBDA * prior_loss


def ddpm(base, prediction):
    return DDPMScheduler.from_config(base.scheduler.config, prediction_type=prediction)


def gradients(loss, unet):
    return torch.cat([grad.flatten().double() for grad in torch.autograd.grad(loss, list(unet.parameters()))])


def differences(ours, ours_unet, reference, reference_unet):
    """(relative loss difference, relative gradient difference in the 2-norm)."""
    mine, theirs = gradients(ours, ours_unet), gradients(reference, reference_unet)
    return abs(ours.item() / reference.item() - 1), ((mine - theirs).norm() / theirs.norm()).item()


RIGHT = [(p, prior, w) for p in ("epsilon", "v_prediction") for prior, w in ((0, "none"), (1, "none"), (0, "min_snr"))]


@pytest.mark.parametrize("prediction, prior, weighting", RIGHT)
def test_equal_to_diffusers_where_it_is_right(base, prediction, prior, weighting):
    step, batch, states = setting(base, prediction, prior, weighting)
    peer = ddpm(base, prediction)
    reference = diffusers_loss(
        peer, *predict(step.denoiser, peer, batch, states, base.vae.config.scaling_factor), prior, weighting
    )
    loss, grad = differences(step(batch, STEP).loss, step.denoiser, reference, step.denoiser)
    assert loss < LOSS_CLOSE and grad < GRAD_CLOSE


def equation_float64(base, step, batch, states, prediction, mutant=None):
    """(sum_b share * role * min_snr * mean|f - y|^2, its U-Net), all in float64."""
    unet = copy.deepcopy(step.denoiser).double()
    alpha_bar = ddpm(base, prediction).alphas_cumprod.double()
    latents, noise, timesteps = (part.double() for part in draws(batch, base.vae.config.scaling_factor))
    level = alpha_bar[timesteps.long()][:, None, None, None]
    noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
    target = noise if prediction == "epsilon" else level.sqrt() * noise - (1 - level).sqrt() * latents
    error = (unet(noisy, timesteps.long(), states.double(), return_dict=False)[0] - target).square().mean([1, 2, 3])
    snr = (level / (1 - level)).flatten()
    weight = snr.clamp(max=GAMMA) / (snr if prediction == "epsilon" else snr + 1)
    role = torch.tensor([1.0, LAMBDA], dtype=torch.float64)[batch.role_B]
    if mutant == "lambda dropped":
        role = torch.ones_like(role)
    if mutant == "weights of mixed roles":
        weight = weight.roll(BATCH)
    if mutant == "prior unweighted":
        weight = torch.where(batch.role_B == 1, 1.0, weight)
    share = 1 / (2 * BATCH if mutant == "mean over both roles" else BATCH)
    return (error * weight * role).sum() * share, unet


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_equal_to_float64_autograd_where_diffusers_is_wrong(base, prediction):
    step, batch, states = setting(base, prediction, True, "min_snr")
    reference, unet = equation_float64(base, step, batch, states, prediction)
    loss, grad = differences(step(batch, STEP).loss, step.denoiser, reference, unet)
    assert loss < LOSS_CLOSE and grad < GRAD_CLOSE


MUTANTS = ["lambda dropped", "weights of mixed roles", "mean over both roles", "prior unweighted"]


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_wrong_formulas_are_caught(base, prediction, mutant):
    step, batch, states = setting(base, prediction, True, "min_snr")
    wrong, unet = equation_float64(base, step, batch, states, prediction, mutant)
    loss, grad = differences(step(batch, STEP).loss, step.denoiser, wrong, unet)
    assert loss > 100 * LOSS_CLOSE and grad > 100 * GRAD_CLOSE


def test_diffusers_own_min_snr_with_prior_fails(base):
    """Why the peer cannot be the reference there: two errors meet four weights."""
    step, batch, states = setting(base, "epsilon", True, "min_snr")
    peer = ddpm(base, "epsilon")
    forward = predict(step.denoiser, peer, batch, states, base.vae.config.scaling_factor)
    with pytest.raises(RuntimeError, match="size of tensor"):
        diffusers_loss(peer, *forward, True, "min_snr")
