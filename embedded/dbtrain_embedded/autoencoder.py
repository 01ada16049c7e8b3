"""The VAE of the embedded base: AutoencoderKL, 64 x 64 x 3 -> 8 x 8 x 16, and its training.

After training, the per-channel mean and deviation of the latents are folded into the 1x1 quant and post-quant
convolutions, so that the latents have unit variance, `scaling_factor` is 1 and the stock pipeline applies.
"""

from pathlib import Path

import numpy as np
import torch

from dbtrain_embedded import pool
from dbtrain_embedded.loops import Trainer, autocast, crew_rank, device, stream_of, weights

CHANNELS = (16, 32, 64, 96)
LATENT_CHANNELS = 16


def build(channels: tuple = CHANNELS):
    """A fresh AutoencoderKL."""
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
    """(L1 + 0.5 gradient L1, L1) of pictures in [-1, 1]."""
    error = output.float() - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges, error.abs().mean()


def train(work: Path, minutes: float, batch: int = 12, lr: float = 1.5e-3):
    """Train on the pool's pictures with L1 + 0.5 gradient L1 + 3e-4 KL; the EMA model."""
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
        spread = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return loss + 3e-4 * spread, {"mae": mae, "kl": spread}

    return trainer.run(loss_of_step, every=200, watch=lambda average, step: {"held_mae": mae_of(average, held)})


def train_decoder(work: Path, minutes: float, batch: int = 12, lr: float = 1e-3) -> None:
    """Train the decoder on, with the encoder and the normalization frozen: it reads the pool's latents.

    The UNet's latents stay valid, so both can train at the same time. Latents get noise of deviation 0.03, about
    the posterior's own, and the checkpoint is a whole folded VAE: `work`/decoder.pt.
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
        z = torch.from_numpy(latents[rows]).to(device()).float().contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model.decode(z + 0.03 * torch.randn_like(z)).sample
        loss, mae = reconstruction_loss(output, pool.to_tensor(images[rows]))
        return loss, {"mae": mae}

    trainer.run(loss_of_step, every=200, watch=lambda average, step: {"held_mae": mae_of(average, held)})


@torch.no_grad()
def mae_of(vae, pixels: torch.Tensor) -> float:
    """Mean absolute error in [-1, 1] of the reconstruction from the posterior mean."""
    return float((vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1) - pixels).abs().mean())


@torch.no_grad()
def encode(vae, images: np.ndarray, batch: int = 128) -> torch.Tensor:
    """Posterior means, float32 (N, 16, 8, 8), of uint8 pictures."""
    found = []
    for start in range(0, len(images), batch):
        pixels = pool.to_tensor(np.asarray(images[start : start + batch])).contiguous(memory_format=torch.channels_last)
        found.append(vae.encode(pixels).latent_dist.mean.cpu())
    return torch.cat(found)


@torch.no_grad()
def fold_normalization(vae, means: torch.Tensor) -> None:
    """Make latents zero-mean, unit-variance per channel, by rewriting quant_conv and post_quant_conv in place."""
    mu = means.mean(dim=(0, 2, 3)).to(vae.quant_conv.weight.device)
    sd = means.std(dim=(0, 2, 3)).to(mu)
    quant, post, n = vae.quant_conv, vae.post_quant_conv, len(mu)
    quant.weight[:n] /= sd[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - mu) / sd
    quant.bias[n:] -= 2 * sd.log()
    post.bias += (post.weight[:, :, 0, 0] * mu).sum(dim=1)
    post.weight *= sd[None, :, None, None]
