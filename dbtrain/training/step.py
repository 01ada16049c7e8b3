"""The training step: L = sum_b W_b * mean|f(x_t, t, c)_b - y_b|^2, with W_b = share_b * role_b * weight(SNR(t_b))."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbtrain.engines.loss_scale import DTYPES
from dbtrain.models.family import Family, Models, Tokens, exactly, noise_shift
from dbtrain.objective.timesteps import first_words, level_words
from dbtrain.objective.weighting import weight_table
from dbtrain.randomness import Purpose
from dbtrain.settings.config import RunConfig
from dbtrain.values import Batch, Conditioning, Role, StepLoss
from dbtrain_kernels.loss import loss
from dbtrain_kernels.noising import noising
from dbtrain_kernels.reference import Noised

PURPOSES = (
    int(Purpose.POSTERIOR),
    int(Purpose.NOISE),
    int(Purpose.OFFSET),
    int(Purpose.TIMESTEP),
    int(Purpose.STRATUM),
)
"""Counter words of a sample's random numbers, in the order in which `noising` takes them."""
GUIDE_PURPOSES = (PURPOSES[0], int(Purpose.AUGMENT), PURPOSES[2], int(Purpose.LEVEL), PURPOSES[4])
"""The same for the guide of a denoiser that enlarges; of these, its noise and its level are used."""


def enlarged(low_BCHW: Tensor, like_BCHW: Tensor, how: str) -> Tensor:
    """Small pictures in the size of large ones, as `super.enlarge` says. `bicubic` is PIL's filter."""
    if how == "aligned":
        return F.interpolate(low_BCHW, like_BCHW.shape[2:], mode="bilinear", align_corners=True)
    return F.interpolate(low_BCHW, like_BCHW.shape[2:], mode="bicubic", antialias=True).clamp(-1, 1)


class TrainingStep(nn.Module):
    """A denoiser, and the text encoders if they train, as the module that an engine runs.

    captions: cached `Conditioning` of every caption, or `Tokens` to encode anew each step. key: the subject's random
    stream. All randomness is named by (key, step, slot), so it is the same at any number of ranks.

    For a pack, `key` is [N, 2], `prior_weight` [N] and the step of `forward` [N], a row for each subject, and
    `batch.subject_B` names the row of each sample. The loss is the sum of the subjects' own losses, so no subject
    changes the gradient of another.
    """

    def __init__(
        self,
        family: Family,
        models: Models,
        config: RunConfig,
        key: tuple[int, int] | Tensor,
        captions: Conditioning | Tokens,
        prior_weight: float | Tensor | None = None,
    ):
        super().__init__()
        self.family, self.config, self.captions = family, config, captions
        self.prior_weight = config.prior.weight if prior_weight is None else prior_weight
        self.denoiser, self.attention = models.denoiser, models.attention
        self.text_encoders = nn.ModuleDict(models.text_encoders if isinstance(captions, tuple) else {})
        self.schedule = models.schedule
        self.weight_S = weight_table(config.objective.weighting, self.schedule, config.objective.snr_gamma)
        device = self.weight_S.device
        self.key_N2 = key if isinstance(key, Tensor) else torch.tensor([key], device=device)
        self.first_S = first_words(config.objective, len(self.weight_S), device, noise_shift(family, models, config))
        self.scale_N: Tensor | None = None
        """Loss scales of a pack's rows in fp16; None elsewhere."""
        self.levels = models.levels
        if self.levels is not None:
            lowest, highest = config.super.level, config.super.level_highest
            ends = (lowest, lowest if highest is None else highest)
            self.level_S = level_words(*ends, len(self.levels.alpha_S), device)
        # The VAE is fixed and never sharded, so it is kept out of the registered modules.
        object.__setattr__(self, "vae", models.vae)

    def forward(self, batch: Batch, step: int | Tensor) -> StepLoss:
        """The loss of a micro-batch at optimizer step `step`, as this rank's part of the global sum."""
        drawn = self.noised(batch, step)
        batch = self.guided(batch, step, drawn.noisy)
        time_B = self.schedule.time_S[drawn.index_B]
        with self.attention.watched() if self.attention else nullcontext():
            prediction = self.prediction(batch, drawn.noisy, time_B)
        alpha_B, sigma_B = (table_S[drawn.index_B] for table_S in (self.schedule.alpha_S, self.schedule.sigma_S))
        weight_B = self.weights(batch, drawn.index_B).to(drawn.clean.dtype)
        parameterization = self.schedule.parameterization
        # A row's loss scale is in the sum that backward begins with, and in nothing that is measured.
        scaled_B = weight_B if self.scale_N is None else weight_B * self.scale_N[batch.subject_B]
        levels = (alpha_B, sigma_B, scaled_B, parameterization)
        result = loss(prediction, drawn.clean, drawn.noise, *levels, batch.mask_B1HW)
        return StepLoss(result.total, result.per_sample_B, weight_B)

    def prediction(self, batch: Batch, noisy: Tensor, time_B: Tensor) -> Tensor:
        """What the denoiser says of noisy latents, in the compute precision."""
        if (half := self.half) is not None:
            told = self.conditioning(batch).to(half)
            return self.family.denoise(self.denoiser, noisy.to(half), time_B, told, batch)
        with self.autocast(noisy.device.type):
            return self.family.denoise(self.denoiser, noisy, time_B, self.conditioning(batch), batch)

    @property
    def half(self) -> torch.dtype | None:
        """bf16 or fp16 where every weight is, as in a pack, whose adapters are copies of fp32 masters; else None.
        Autocast would cast around every norm and every adapter, in every call; here nothing needs a cast."""
        dtypes = {param.dtype for param in self.parameters()}
        return next((half for half in (torch.bfloat16, torch.float16) if dtypes == {half}), None)

    def autocast(self, device_type: str) -> torch.autocast:
        """The compute precision of weights that are not all in it.

        Autocast's cache is off: a weight is used once per pass, and ZeRO-3 frees it after its layer.
        """
        dtype = DTYPES[self.config.train.precision]
        half = dtype if dtype != torch.float32 else torch.bfloat16
        return torch.autocast(device_type, half, enabled=dtype != torch.float32, cache_enabled=False)

    def noised(self, batch: Batch, step: int | Tensor) -> Noised:
        """Clean latents (drawn anew each step from moments), noise, x_t and t, all named by (key, step, slot)."""
        moments = batch.images_BCHW
        if not self.family.codec.is_encoded(moments):
            with torch.no_grad():
                moments = self.family.codec.encode(self.vae, moments)
        scale, shift = self.family.codec.scale(self.vae)
        return noising(
            moments,
            *self.names(batch, step),
            self.schedule.alpha_S,
            self.schedule.sigma_S,
            PURPOSES,
            scale,
            shift,
            self.config.objective.noise_offset,
            first_S=self.first_S,
            strata=0 if self.first_S is not None else self.config.train.batch,
        )

    def guided(self, batch: Batch, step: int | Tensor, noisy: Tensor) -> Batch:
        """The batch with the guide of a denoiser that enlarges: a_l enlarged(low) + s_l eps', at a level l in
        `super.level` ... `super.level_highest`. eps' and l are named by (key, step, slot)."""
        if self.family.guide is None:
            return batch
        low, levels = batch.low_BCHW, self.levels
        assert low is not None and levels is not None, "a bank without low-resolution pictures"
        if self.family.guide.enlarged:
            low = enlarged(low, noisy, self.config.super.enlarge)
        drawn = noising(
            exactly(low),
            *self.names(batch, step),
            levels.alpha_S,
            levels.sigma_S,
            GUIDE_PURPOSES,
            first_S=self.level_S,
        )
        return replace(batch, guide_BCHW=drawn.noisy, level_B=drawn.index_B)

    def names(self, batch: Batch, step: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What names the random numbers of each sample: (key [B, 2], slot [B], step [B])."""
        if batch.subject_B is None:
            return self.key_N2.expand(len(batch.slot_B), 2), batch.slot_B, torch.full_like(batch.slot_B, step)
        return self.key_N2[batch.subject_B], batch.slot_B, torch.as_tensor(step)[batch.subject_B]

    def conditioning(self, batch: Batch) -> Conditioning:
        """Text conditioning of each sample, looked up or encoded with gradients."""
        if isinstance(self.captions, Conditioning):
            return self.captions[batch.caption_B]
        tokens = tuple(ids[batch.caption_B] for ids in self.captions)
        return self.family.encode_tokens(dict(self.text_encoders.items()), tokens)

    def weights(self, batch: Batch, index_B: Tensor) -> Tensor:
        """W_B: 1/(samples of the role in the subject's whole step), times lambda for priors, times the SNR weight."""
        own = batch.subject_B
        weight = self.prior_weight if own is None else torch.as_tensor(self.prior_weight)[own]
        role_B = torch.where(batch.role_B == int(Role.PRIOR), weight, 1.0)
        return role_B / self.config.train.batch * self.weight_S[index_B]
