"""The UNet of the embedded base: v-prediction on 8 x 8 x 16 latents, zero-terminal SNR, and its training."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from dbtrain_embedded import autoencoder, pool, sprites
from dbtrain_embedded.encoders import build_clip
from dbtrain_embedded.loops import Trainer, autocast, crew_rank, device, stream_of, weights
from dbtrain_embedded.vocabulary import Captions

WIDTHS = (96, 144)
HEADS = (4, 6)


def build(context_width: int = 128):
    """An untrained `UNet2DConditionModel` with cross-attention on both levels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=autoencoder.LATENT_CHANNELS,
        out_channels=autoencoder.LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=WIDTHS,
        cross_attention_dim=context_width,
        attention_head_dim=HEADS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        norm_num_groups=8,
    )


def build_scheduler():
    """A DDIM scheduler: Stable Diffusion's betas rescaled to zero terminal SNR (arXiv 2305.08891), v-prediction."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def load_clip(work: Path, tokenizer):
    """The trained CLIP pair (EMA) of stage `clip`, frozen."""
    model = build_clip(tokenizer).eval().requires_grad_(False).to(device())
    model.load_state_dict(weights(work, "clip"))
    return model


def load_vae(work: Path):
    """The trained VAE (EMA) of stage `vae`, frozen, its latents normalized over the pool's first 2,048 scenes."""
    vae = autoencoder.build().eval().requires_grad_(False).to(device())
    vae.load_state_dict(weights(work, "vae"))
    autoencoder.fold_normalization(vae, autoencoder.encode(vae, pool.pictures(work)[:2048]))
    return vae.to(memory_format=torch.channels_last)


def write_latents(work: Path, vae=None) -> None:
    """Write the latents of the pool's pictures to `work`/latents.npy, and the folded VAE to `work`/vae-folded.pt.

    vae: the folded VAE; None takes the one of stage `vae`.
    """
    vae, images = vae or load_vae(work), pool.pictures(work)
    latents = np.lib.format.open_memmap(work / "latents.part.npy", "w+", np.float16, (len(images), 16, 8, 8))
    for start in range(crew_rank(), len(images), 1000):
        latents[start : start + 1000] = autoencoder.encode(vae, images[start : start + 1000]).numpy()
    latents.flush()
    torch.save(vae.state_dict(), work / "vae-folded.pt")
    (work / "latents.part.npy").replace(work / "latents.npy")


def timesteps(count: int, rng) -> np.ndarray:
    """`count` training timesteps in 0..999, in random order, one in each of `count` equally likely parts of that range.

    Two of three are 500 or more, where it is decided what a picture shows. Every batch has low and high noise alike, so
    its loss varies less than with independent timesteps.
    """
    shares = (np.arange(count) + rng.random(count)) / count
    return rng.permutation(np.interp(shares, (0, 1 / 3, 1), (0, 500, 1000)).astype(np.int64))


def chances(facts: list[dict]) -> np.ndarray:
    """How likely each scene of the pool is to be taken, cumulated, the last being 1.

    A class with k drawings is taken k^0.75 times as often as one with one drawing: it has more to learn. A scene with
    a colour, an accessory, a style or a close view is taken twice as often as another.
    """
    drawings = Counter(row.noun for row in sprites.load("train")[0])
    changed = [f["view"] == "close" or any(f[key] for key in ("colour", "accessory", "style")) for f in facts]
    total = np.cumsum([drawings[f["noun"]] ** 0.75 * (1 + more) for f, more in zip(facts, changed, strict=True)])
    return total / total[-1]


def train(work: Path, minutes: float, tokenizer_path: str, batch: int = 64, lr: float = 1.2e-3) -> None:
    """Train on the pool's latents with mean |v - v_theta|^2, 10% empty captions; checkpoint `work`/unet.pt.

    batch: samples of one crew member. lr: the highest rate; it is zero at the end of the minutes.
    """
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_path)
    text = load_clip(work, tokenizer).text_model
    latents, facts = np.load(work / "latents.npy", mmap_mode="r"), pool.facts(work)
    captions = Captions(tokenizer, [f["caption"] for f in facts], [f["noun"] for f in facts])
    likely = chances(facts)
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod.sqrt().to(device())
    sigmas = (1 - scheduler.alphas_cumprod).sqrt().to(device())
    torch.manual_seed(2)
    model = build().to(device(), memory_format=torch.channels_last)
    trainer = Trainer("unet", model, work, minutes, lr, muon=True, ema=0.999)
    torch.manual_seed(1000 * trainer.step + crew_rank())

    def loss_of_step(step):
        rng = stream_of(4, step)
        rows = likely.searchsorted(rng.random(batch), "right")
        tokens = captions.take(rows, rng)
        tokens[rng.random(batch) < 0.1] = captions.empty
        clean = torch.from_numpy(latents[rows]).to(device()).float().contiguous(memory_format=torch.channels_last)
        noise, t = torch.randn_like(clean), torch.from_numpy(timesteps(batch, rng)).to(device())
        alpha, sigma = alphas[t, None, None, None], sigmas[t, None, None, None]
        with torch.no_grad():
            context = text(torch.from_numpy(tokens).to(device())).last_hidden_state
        with autocast():
            prediction = trainer.model(alpha * clean + sigma * noise, t, context).sample
        # x_t = alpha x_0 + sigma noise, and v = alpha noise - sigma x_0 (arXiv 2202.00512).
        error = (prediction.float() - (alpha * noise - sigma * clean)).square().mean(dim=(1, 2, 3))
        return error.mean(), {"noisy_half": error[t >= 500].mean()}

    trainer.run(loss_of_step, every=100)
