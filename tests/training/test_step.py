"""The training step against the equation in float64 autograd, written out sample by sample; mutants are caught."""

import pytest
import torch
from torch import nn

from dbtrain.models.family import Models
from dbtrain.objective.noise import discrete_schedule, flow_schedule
from dbtrain.randomness import Purpose, stream_key, uniforms
from dbtrain.settings.config import ObjectiveConfig, PriorConfig, RunConfig, TrainConfig
from dbtrain.training.step import TrainingStep
from dbtrain.values import Batch, Conditioning, Role
from tests.kit.fake_family import fake_family
from tests.kit.normals import normals

KEY = stream_key(7, "rex")
BATCH, LAMBDA, GAMMA, STEP = 4, 0.625, 0.5, 10  # batch and lambda are exact in float32, where the step multiplies them
CLOSE = 1e-12
"""Relative: all arithmetic is float64 on both sides; a few hundred roundings of 2^-53."""


class Denoiser(nn.Module):
    """A small nonlinear map of (x_t, t, states), in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.tell = nn.Linear(4, 4), nn.Linear(5, 4)
        self.double()

    def forward(self, x_t, time_B, states_BTD):
        told = self.tell(states_BTD.mean(1)) + torch.sin(time_B.double() / 100)[:, None]
        return torch.tanh(self.mix(x_t.movedim(1, -1)) + told[:, None, None]).movedim(-1, 1)


class Vae:
    """Only what `sample_latents` reads."""

    class config:
        scaling_factor = 0.5
        shift_factor = None


def denoise(denoiser, x_t, time_B, conditioning, batch):
    return denoiser(x_t, time_B, conditioning.states_BTD)


def encode_tokens(encoders, tokens):
    return Conditioning(encoders["text_encoder"](tokens[0]))


FAMILY = fake_family(encode_tokens=encode_tokens, denoise=denoise, text_encoders=("text_encoder",))
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def schedule(parameterization, zero_terminal=False):
    if parameterization == "flow":
        return flow_schedule(1000, 3.0)
    return discrete_schedule(ALPHA_BAR, parameterization, zero_terminal)


def config(weighting="none", prior=LAMBDA, batch=BATCH, **objective):
    return RunConfig(
        train=TrainConfig(batch=batch),
        prior=PriorConfig(weight=prior),
        objective=ObjectiveConfig(weighting=weighting, snr_gamma=GAMMA, **objective),
    )


def captions():
    return Conditioning(torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def step_of(settings, parameterization="epsilon", told=None):
    encoder = nn.Embedding(10, 5).double()
    models = Models(Denoiser(), {"text_encoder": encoder}, {}, Vae, None, schedule(parameterization), "fake")
    return TrainingStep(FAMILY, models, settings, KEY, captions() if told is None else told)


def batch_of(prior=True, batch=BATCH):
    """`batch` instance samples and as many priors, with VAE moments [2C = 8, 4, 4] in float64."""
    count = 2 * batch if prior else batch
    moments = torch.randn(count, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    role = torch.tensor([Role.INSTANCE] * batch + [Role.PRIOR] * (count - batch))
    return Batch(moments, role.clone(), role, torch.arange(count), torch.zeros(count, 6))


def draws(batch):
    """(latents, noise, timesteps) that are named for these slots, from `randomness` alone."""
    mean, logvar = batch.images_BCHW.chunk(2, 1)
    z = normals(KEY, Purpose.POSTERIOR, STEP, batch.slot_B, (4, 4, 4)).double()
    noise = normals(KEY, Purpose.NOISE, STEP, batch.slot_B, (4, 4, 4)).double()
    t = (uniforms(KEY, Purpose.TIMESTEP, STEP, batch.slot_B) * 1000).long()
    return (mean + torch.exp(logvar / 2) * z) * 0.5, noise, t


def levels(parameterization, t):
    if parameterization == "flow":
        s = (t + 1) / 1000
        sigma = 3 * s / (1 + 2 * s)
        return 1 - sigma, sigma, 1000 * sigma
    alpha_bar = float(ALPHA_BAR[t])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5, t


def weight_of(weighting, parameterization, snr, gamma=GAMMA):
    """The published closed forms, one by one."""
    if weighting == "none":
        return 1.0
    clipped = min(snr, gamma) if weighting == "min_snr" else snr * gamma / (snr + gamma)
    flow_factor = 1 / (1 + snr**0.5) ** 2  # sigma^2 with alpha = 1 - sigma and snr = (alpha / sigma)^2
    return (
        clipped
        * {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": 1, "flow": flow_factor}[parameterization]
    )


def expected(denoiser, batch, weighting, parameterization, prior, mutant=None):
    """The equation, sample by sample: sum_b share * role * weight * mean|f - y|^2."""
    clean, noise, timesteps = draws(batch)
    states = captions().states_BTD
    total, count = 0.0, len(batch.role_B)
    level = [levels(parameterization, int(t)) for t in timesteps]
    for b in range(count):
        alpha, sigma, time = level[b]
        x, eps = clean[b : b + 1], noise[b : b + 1]
        y = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x, "sample": x, "flow": eps - x}[parameterization]
        f = denoiser(
            alpha * x + sigma * eps, torch.tensor([time], dtype=torch.float64), states[batch.caption_B[b]][None]
        )
        is_prior = bool(batch.role_B[b] == Role.PRIOR)
        other = level[(b + BATCH) % count] if mutant == "weight of the other role" else level[b]
        gamma = float("inf") if mutant == "no clamp" else GAMMA
        weight = weight_of(weighting, parameterization, (other[0] / other[1]) ** 2, gamma)
        if mutant == "prior unweighted" and is_prior:
            weight = 1.0
        role = prior if is_prior and mutant != "lambda dropped" else 1.0
        share = 1 / (count if mutant == "mean over all samples" else BATCH)
        total = total + share * role * weight * ((f - y) ** 2).mean()
    return total


def gradients(loss, module):
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(module.parameters()))])


def distance(got, want):
    return ((got - want).norm() / want.norm()).item()


PARAMETERIZATIONS = ("epsilon", "v_prediction", "sample", "flow")
WEIGHTINGS = ("none", "min_snr", "soft_min_snr")


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prior", [True, False])
def test_loss_and_gradients_are_the_equation(parameterization, weighting, prior):
    step, batch = step_of(config(weighting, LAMBDA if prior else 0), parameterization), batch_of(prior)
    out = step(batch, STEP)
    want = expected(step.denoiser, batch, weighting, parameterization, LAMBDA)
    assert out.loss.dtype == torch.float64
    assert out.loss.item() == pytest.approx(want.item(), rel=CLOSE)
    assert distance(gradients(out.loss, step.denoiser), gradients(want, step.denoiser)) < CLOSE


MUTANTS = ("no clamp", "lambda dropped", "weight of the other role", "mean over all samples", "prior unweighted")


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_wrong_formulas_are_far_off(mutant, parameterization):
    step, batch = step_of(config("min_snr"), parameterization), batch_of()
    loss, wrong = step(batch, STEP).loss, expected(step.denoiser, batch, "min_snr", parameterization, LAMBDA, mutant)
    assert abs(loss.item() / wrong.item() - 1) > 1e-3
    assert distance(gradients(loss, step.denoiser), gradients(wrong, step.denoiser)) > 1e-3


def test_step_loss_keeps_the_kernels_contract():
    out = step_of(config("min_snr"))(batch_of(), STEP)
    assert out.loss.item() == (out.per_sample_B * out.weight_B).sum().item()
    assert out.per_sample_B.shape == out.weight_B.shape == (2 * BATCH,)


def test_micro_batches_add_up_and_order_does_not_matter():
    step, batch = step_of(config("min_snr")), batch_of()
    whole = step(batch, STEP)
    parts = [step(batch[torch.tensor(rows)], STEP) for rows in ([4, 0], [5, 7], [1, 6, 3, 2])]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=CLOSE)
    assert torch.allclose(parts[0].per_sample_B, whole.per_sample_B[[4, 0]], rtol=CLOSE)


def test_prior_samples_have_their_own_timesteps_and_noise():
    step, batch = step_of(config()), batch_of()
    _, noise, _, t = step.noised(batch, STEP)
    assert not set(t[:BATCH].tolist()) & set(t[BATCH:].tolist())
    assert not torch.equal(noise[:BATCH], noise[BATCH:])
    assert torch.equal(t[:BATCH], step_of(config(prior=0)).noised(batch_of(prior=False), STEP).index_B)


def test_stratified_covers_the_schedule_by_role():
    count = 8
    settings = config(batch=count, timesteps="stratified")
    t = step_of(settings).noised(batch_of(batch=count), STEP).index_B
    rotation = uniforms(KEY, Purpose.STRATUM, STEP, torch.zeros(1, dtype=torch.long)).item()
    for role in (t[:count], t[count:]):
        strata = ((role.double() + 0.5) / 1000 - rotation) % 1 * count  # the middle of a timestep's cell
        inside = (strata % 1 - 0.5).abs() < 0.5 - 0.01 * count / 2  # cells cut by a stratum's edge say nothing
        assert inside.sum() >= count - 2
        assert len(set(strata[inside].floor().tolist())) == inside.sum()
    assert not torch.equal(t[:count], t[count:])


def test_noise_offset_adds_one_constant_a_channel():
    batch = batch_of()
    plain = step_of(config()).noised(batch, STEP).noise
    shifted = step_of(config(noise_offset=0.1)).noised(batch, STEP).noise - plain
    constant = 0.1 * normals(KEY, Purpose.OFFSET, STEP, batch.slot_B, (4, 1, 1))
    assert (shifted - constant).abs().max() < 2.0**-21  # the sum was rounded at a size below 8
    assert shifted.abs().max() > 0.05


def test_a_text_encoder_that_trains_gets_the_gradient_of_the_equation():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    step, batch = step_of(config("min_snr"), told=(ids,)), batch_of()
    out = step(batch, STEP)
    table = step.text_encoders["text_encoder"].weight
    got = torch.autograd.grad(out.loss, table, retain_graph=True)[0]
    nudge = torch.zeros_like(table)
    nudge[5, 2] = 1e-4
    with torch.no_grad():  # central difference: error 1e-8 / 6 of the third derivative, 1e-12 of rounding
        table += nudge
        above = step(batch, STEP).loss
        table -= 2 * nudge
        below = step(batch, STEP).loss
    assert got[5, 2].item() == pytest.approx(((above - below) / 2e-4).item(), rel=1e-6)
    assert (got[1:7].abs().sum(1) > 0).all() and (got[7:] == 0).all()


def test_cached_captions_keep_the_text_encoder_out_of_the_module():
    assert not list(step_of(config()).text_encoders.parameters())
    assert list(step_of(config(), told=(torch.tensor([[1, 2, 3]]),)).text_encoders.parameters())


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased", "none"])
def test_the_last_timestep_of_a_zero_snr_schedule_gives_a_finite_gradient(weighting):
    models = Models(Denoiser(), {}, {}, Vae, None, schedule("v_prediction", zero_terminal=True), "fake")
    step = TrainingStep(FAMILY, models, config(weighting), KEY, captions())
    step.first_S = torch.zeros(1000, dtype=torch.long)  # every word is at least 0, so t is always 999
    loss = step(batch_of(), STEP).loss
    assert torch.isfinite(loss) and torch.isfinite(gradients(loss, step.denoiser)).all()
