"""The VAE: normalization folded into its weights changes the latents and not the pictures."""

import torch

from dbtrain_embedded import autoencoder, pool


def test_folded_vae_reconstructs_alike_with_unit_latents():
    torch.manual_seed(0)
    vae = autoencoder.build().eval().requires_grad_(False)
    vae.quant_conv.weight.mul_(3).add_(0.05)
    images = pool.held_out(8)[0]
    pixels = pool.to_tensor(images)
    before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    autoencoder.fold_normalization(vae, autoencoder.encode(vae, images))
    means = autoencoder.encode(vae, images)
    # fp32, five to six layers between: 1e-4 is a hundred roundings.
    assert torch.allclose(vae.decode(vae.encode(pixels).latent_dist.mean).sample, before, atol=1e-4)
    assert torch.allclose(means.mean(dim=(0, 2, 3)), torch.zeros(16), atol=1e-4)
    assert torch.allclose(means.std(dim=(0, 2, 3)), torch.ones(16), atol=1e-4)
