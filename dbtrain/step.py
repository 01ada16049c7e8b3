"""The training step: L = sum_b W_b * mean|f(x_t, t, c)_b - y_b|^2, with W_b = share_b * role_b * weight(SNR(t_b))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dbtrain.batch import Batch, Conditioning, Role, StepLoss
from dbtrain.config import RunConfig
from dbtrain.families import Family, Models, encode_images, sample_latents
from dbtrain.families.family import Tokens
from dbtrain.objective.noise import add_noise, per_sample
from dbtrain.objective.target import TARGETS
from dbtrain.objective.timesteps import Draw, timestep_index
from dbtrain.objective.weighting import weight_table
from dbtrain.randomness import Purpose, normals, uniforms


class TrainingStep(nn.Module):
    """A denoiser, and the text encoders if they train, as the module that an engine runs.

    captions: cached `Conditioning` of every caption, or `Tokens` to encode anew each step. key: the subject's random
    stream. All randomness is named by (key, step, slot), so it is the same at any number of ranks.
    """

    def __init__(
        self, family: Family, models: Models, config: RunConfig, key: tuple[int, int], captions: Conditioning | Tokens
    ):
        super().__init__()
        self.family, self.config, self.key, self.captions = family, config, key, captions
        self.denoiser = models.denoiser
        self.text_encoders = nn.ModuleDict(models.text_encoders if isinstance(captions, tuple) else {})
        self.schedule = models.schedule
        self.weight_S = weight_table(config.objective.weighting, self.schedule, config.objective.snr_gamma)
        # The VAE is fixed and never sharded, so it is kept out of the registered modules.
        object.__setattr__(self, "vae", models.vae)

    def forward(self, batch: Batch, step: int) -> StepLoss:
        """The loss of a micro-batch at optimizer step `step`, as this rank's part of the global sum."""
        clean = self.latents(batch, step)
        noise = self.noise(batch, step, clean.shape[1:])
        index_B = self.timesteps(batch, step)
        x_t = add_noise(clean, noise, self.schedule, index_B)
        with torch.autocast(
            clean.device.type,
            torch.bfloat16,
            enabled=self.config.train.precision == "bf16",
            cache_enabled=self.config.engine.zero.stage != 3,
        ):
            prediction = self.family.denoise(
                self.denoiser, x_t, self.schedule.time_S[index_B], self.conditioning(batch), batch
            )
        alpha, sigma = (per_sample(table, index_B, clean) for table in (self.schedule.alpha_S, self.schedule.sigma_S))
        target = TARGETS[self.schedule.parameterization](clean, noise, alpha, sigma)
        per_sample_B = (prediction.to(target.dtype) - target).square().flatten(1).mean(1)
        weight_B = self.weights(batch, index_B).to(per_sample_B.dtype)
        return StepLoss((per_sample_B * weight_B).sum(), per_sample_B, weight_B)

    def latents(self, batch: Batch, step: int) -> Tensor:
        """Clean latents, drawn anew each step from cached moments or from pixels encoded now."""
        moments = batch.images_BCHW
        if moments.shape[1] == 3:
            with torch.no_grad():
                moments = encode_images(self.vae, moments)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        return sample_latents(self.vae, moments, normals(self.key, Purpose.POSTERIOR, step, batch.slot_B, shape))

    def noise(self, batch: Batch, step: int, shape: tuple[int, ...]) -> Tensor:
        """eps: standard normal, plus an optional per-channel constant."""
        noise = normals(self.key, Purpose.NOISE, step, batch.slot_B, shape)
        if self.config.objective.noise_offset:
            constant = normals(self.key, Purpose.OFFSET, step, batch.slot_B, (shape[0], 1, 1))
            noise = noise + self.config.objective.noise_offset * constant
        return noise

    def timesteps(self, batch: Batch, step: int) -> Tensor:
        """Schedule index of each sample; prior samples have their own, independent of the instance samples'."""
        objective, count = self.config.objective, self.config.train.batch
        rotation = uniforms(self.key, Purpose.STRATUM, step, torch.zeros(1, dtype=torch.long)).item()
        draw = Draw(
            uniforms(self.key, Purpose.TIMESTEP, step, batch.slot_B),
            batch.slot_B % count,
            count,
            rotation,
            objective.logit_mean,
            objective.logit_std,
        )
        return timestep_index(objective.timesteps, draw, len(self.schedule.alpha_S))

    def conditioning(self, batch: Batch) -> Conditioning:
        """Text conditioning of each sample, looked up or encoded with gradients."""
        if isinstance(self.captions, Conditioning):
            return self.captions[batch.caption_B]
        tokens = tuple(ids[batch.caption_B] for ids in self.captions)
        return self.family.encode_tokens(dict(self.text_encoders.items()), tokens)

    def weights(self, batch: Batch, index_B: Tensor) -> Tensor:
        """W_B: 1/(samples of the role in the global batch), times lambda for priors, times the SNR weight."""
        role_B = torch.where(batch.role_B == int(Role.PRIOR), self.config.prior.weight, 1.0)
        return role_B / self.config.train.batch * self.weight_S[index_B]
