"""The VAE of the embedded base: AutoencoderKL, 64 x 64 x 3 -> 8 x 8 x 16, and its training.

After training, the mean and standard deviation of each latent channel are folded into the 1x1 convolutions
`quant_conv` and `post_quant_conv`. The latents then have zero mean and unit variance, so `scaling_factor` is 1 and
diffusers' own pipeline can be used.
"""

from pathlib import Path

import numpy as np
import torch

from dbtrain_embedded import pool
from dbtrain_embedded.loops import Trainer, autocast, crew_rank, device, stream_of, weights

CHANNELS = (16, 32, 64, 96)
LATENT_CHANNELS = 16


def build(channels: tuple = CHANNELS):
    """An untrained `AutoencoderKL`; `channels` holds the width of each level."""
    from diffusers import AutoencoderKL

    levels = len(channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=None,
    )


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> tuple:
    """(loss, mean absolute error) of pictures in [-1, 1]; the loss is L1 + 0.5 x L1 of the pictures' gradients."""
    error = output.float() - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges, error.abs().mean()


def train(work: Path, minutes: float, batch: int = 12, lr: float = 1.5e-3) -> None:
    """Train on the pool's pictures with `reconstruction_loss` + 3e-4 KL; checkpoint `work`/vae.pt."""
    torch.manual_seed(0)
    images = pool.pictures(work)
    model = build().to(device(), memory_format=torch.channels_last)
    trainer = Trainer("vae", model, work, minutes, lr, muon=True, ema=0.998)
    torch.manual_seed(1000 * trainer.step + crew_rank())
    held, _, _ = pool.held_out(64)
    held = pool.to_tensor(held)

    def loss_of_step(step):
        rows = np.sort(stream_of(1, step).integers(len(images), size=batch))
        pixels = pool.to_tensor(images[rows]).contiguous(memory_format=torch.channels_last)
        with autocast():
            posterior = model.encode(pixels).latent_dist
            output = model.decode(posterior.sample()).sample
        loss, mae = reconstruction_loss(output, pixels)
        # KL(N(mean, var) || N(0, 1)) of each latent value, averaged: a small weight keeps the latents near unit scale.
        divergence = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return loss + 3e-4 * divergence, {"mae": mae, "kl": divergence}

    trainer.run(loss_of_step, every=200, watch=lambda average, step: {"held_mae": mae_of(average, held)})


def train_decoder(work: Path, minutes: float, batch: int = 12, lr: float = 1e-3) -> None:
    """Train only the decoder, from the pool's latents to the pool's pictures; checkpoint `work`/decoder.pt.

    The encoder and the folded normalization are frozen, so the latents on disk stay valid and the UNet can train at
    the same time. Noise of standard deviation 0.03 is added to the latents, which is about the deviation of the
    posterior. The checkpoint holds the whole folded VAE.
    """
    torch.manual_seed(0)
    images, latents = pool.pictures(work), np.load(work / "latents.npy", mmap_mode="r")
    model = build().to(device(), memory_format=torch.channels_last)
    model.load_state_dict(weights(work, "vae-folded"))
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    trainer = Trainer("decoder", model, work, minutes, lr, muon=True, ema=0.998)
    torch.manual_seed(1000 * trainer.step + crew_rank())
    held = pool.to_tensor(pool.held_out(64)[0])

    def loss_of_step(step):
        rows = np.sort(stream_of(5, step).integers(len(images), size=batch))
        noiseless = torch.from_numpy(latents[rows]).to(device()).float()
        noiseless = noiseless.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model.decode(noiseless + 0.03 * torch.randn_like(noiseless)).sample
        loss, mae = reconstruction_loss(output, pool.to_tensor(images[rows]))
        return loss, {"mae": mae}

    trainer.run(loss_of_step, every=200, watch=lambda average, step: {"held_mae": mae_of(average, held)})


@torch.no_grad()
def mae_of(vae, pixels: torch.Tensor) -> float:
    """The mean absolute error of pictures in [-1, 1], decoded again from the means of their posteriors."""
    return float((vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1) - pixels).abs().mean())


@torch.no_grad()
def encode(vae, images: np.ndarray, batch: int = 128) -> torch.Tensor:
    """The means of the posteriors, float32 (N, 16, 8, 8), of uint8 pictures (N, 64, 64, 3)."""
    means = []
    for start in range(0, len(images), batch):
        pixels = pool.to_tensor(np.asarray(images[start : start + batch])).contiguous(memory_format=torch.channels_last)
        means.append(vae.encode(pixels).latent_dist.mean.cpu())
    return torch.cat(means)


@torch.no_grad()
def fold_normalization(vae, means: torch.Tensor) -> None:
    """Rewrite quant_conv and post_quant_conv in place, so that each latent channel has zero mean and unit variance.

    means: posterior means (N, 16, 8, 8) of this VAE, which the mean and the deviation are measured on.
    """
    mean = means.mean(dim=(0, 2, 3)).to(vae.quant_conv.weight.device)
    deviation = means.std(dim=(0, 2, 3)).to(mean)
    quant, post, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    # quant_conv's output is (means, log-variances). z' = (z - mean) / deviation is linear, so the means' half takes it
    # into weight and bias. The variance is divided by deviation^2: the log-variance loses 2 log(deviation).
    quant.weight[:channels] /= deviation[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * deviation.log()
    # The inverse: post(z) = W (deviation z' + mean) + b. The bias is first, because it needs the old weight.
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight *= deviation[None, :, None, None]
