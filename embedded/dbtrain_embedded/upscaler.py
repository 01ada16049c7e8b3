"""The upscaler of the embedded base, 64 -> 128 pixels: DeepFloyd IF's stage II in small, and its training.

The UNet sees the noisy high picture and, as its guide, the low picture, enlarged bilinearly and noised to a level that
it is told. It is trained on the picture world at 128 pixels: the low picture is the same scene, reduced. The last
three of its six output channels are IF's learned variance; they are not trained and nothing reads them.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dbtrain.tiny import ASSETS, BASE
from dbtrain_embedded import pool, world
from dbtrain_embedded.denoiser import timesteps
from dbtrain_embedded.loops import Trainer, autocast, crew_rank, device, pace, stream_of, weights

SIDE = 128
UPSCALER = ASSETS / "upscaler"
"""Where the pipeline folder is written. It is not shipped: no run so far has beaten bicubic enlargement."""
WIDTHS = (20, 32, 64, 96)
TOKENS = 77
"""Tokens of a caption: IF's pipelines pad every caption to this length and mask nothing."""
LEVELS = 250
"""The guide is noised to a level below this one; IF's pipeline samples at level 250 unless it is told another."""
STEPS = 1
"""Sampling steps."""
RESIDUAL = 0.07
"""Deviation of a picture from its guide, in [-1, 1]: what the start of training supposes."""
CONSTANT, FIT_STEPS = 24.0, 1500
"""Of the start of training: see `start_as_enlargement`."""
FILTERS = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
"""How a low picture may be reduced; PIL widens each of these filters, so none of them aliases."""


class Models(torch.nn.Module):
    """The upscaler's trained parts: `unet` and `text`."""

    def __init__(self, unet: torch.nn.Module, text: torch.nn.Module):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, noisy, guide, t, levels, tokens) -> torch.Tensor:
        """The predicted v (N, 3, H, W) of `noisy`; `guide` has its shape; t, levels: (N,); tokens: (N, TOKENS)."""
        states = self.text(tokens, attention_mask=(tokens != 0).long()).last_hidden_state
        return self.unet(torch.cat([noisy, guide], dim=1), t, states, class_labels=levels).sample[:, :3]


def build(vocabulary: int, widths: tuple = WIDTHS, text_width: int = 64) -> Models:
    """Untrained `Models`: a UNet with attention on its lowest level only, and a T5 encoder of one layer."""
    from diffusers import UNet2DConditionModel
    from transformers import T5Config, T5EncoderModel

    plain = len(widths) - 1
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=6,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * plain + ("SimpleCrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        cross_attention_dim=text_width,
        attention_head_dim=32,
        norm_num_groups=1,  # more groups would hide how bright a picture is from layers of 16 channels
        class_embed_type="timestep",
        resnet_time_scale_shift="scale_shift",
    )
    sizes = {"d_model": text_width, "d_kv": 32, "d_ff": 128, "num_heads": 2, "num_layers": 1, "dropout_rate": 0.0}
    return Models(unet, T5EncoderModel(T5Config(vocab_size=vocabulary, **sizes)))


def linear_estimate(t: torch.Tensor, levels: torch.Tensor) -> tuple:
    """(c, d): c x_t - d guide is the best linear estimate of v, where picture minus guide has deviation RESIDUAL.

    With x_0 = guide + r: x_t - alpha guide = alpha r + sigma noise, and v = alpha noise - sigma x_0. The guide's own
    noise of a level adds to r.
    """
    a, kept = tables()[0][t], tables()[1][levels]
    alpha, sigma, spread = a.sqrt(), (1 - a).sqrt(), RESIDUAL**2 + (1 - kept) / kept
    c = alpha * sigma * (1 - spread) / (alpha**2 * spread + sigma**2)
    return c, sigma + alpha * c


@torch.no_grad()
def start_as_enlargement(unet: torch.nn.Module) -> None:
    """Set the highest level's last layers so that the untrained UNet says nearly `linear_estimate`.

    A UNet of random weights is slow to learn to copy the guide, and how much of the noisy picture to copy at which t.
    Here the first convolution carries the two pictures, and their negatives, to the last residual block:
    silu(x) - silu(-x) = x, so they pass its layers unchanged. The block's scale, a function of t, is fitted. Two
    opposite constants keep the norms' deviations nearly equal for all pictures. All other layers see only the guide at
    first: what they learn is how the picture differs from it.
    """
    last = unet.up_blocks[-1].resnets[-1]
    width, skip = unet.conv_in.out_channels, last.conv_shortcut.in_channels - unet.conv_in.out_channels
    signs = [(index, sign) for sign in (1.0, -1.0) for index in range(6)]

    def write(layer, row, parts, bias=0.0):
        """Let the layer's `row` be the sum of factor x channel of `parts` at the same place, and a bias."""
        middle = layer.kernel_size[0] // 2
        layer.weight[row] = 0
        for channel, factor in parts:
            layer.weight[row, channel, middle, middle] = factor
        layer.bias[row] = bias

    down, first = unet.down_blocks[0], unet.up_blocks[-1].resnets[0]
    inner = first.conv_shortcut.in_channels - width
    _blind(unet.conv_in, range(3))
    for layer, start in (
        (down.resnets[0].conv1, 0),
        (down.downsamplers[0].conv, 0),
        (first.conv1, inner),
        (first.conv_shortcut, inner),
        (last.conv1, skip),
        (last.conv_shortcut, skip),
    ):
        _blind(layer, [start + index for index in (0, 1, 2, 6, 7, 8)])
    for values in (first.conv2, first.conv_shortcut, last.conv1, last.conv2, last.conv_shortcut, unet.conv_out):
        values.weight.mul_(0.1)
        values.bias.zero_()
    for row, (index, sign) in enumerate(signs):
        write(unet.conv_in, row, [(index, sign)])
        write(last.conv1, row, [(skip + index, sign), (skip + 6 + index, -sign)])
    for row, sign in ((width - 2, CONSTANT), (width - 1, -CONSTANT)):
        write(unet.conv_in, row, [], sign)
        write(last.conv1, row, [], sign)
        write(last.conv2, row, [])
        write(last.conv_shortcut, row, [(skip + row, 1.0)])
    for row in range(3):
        v = [(row, 1.0), (6 + row, -1.0), (3 + row, -1.0), (9 + row, 1.0)]
        write(last.conv2, row, v)
        write(last.conv2, 3 + row, [(channel, -factor) for channel, factor in v])
        write(last.conv_shortcut, row, [])
        write(last.conv_shortcut, 3 + row, [])
        write(unet.conv_out, row, [(row, 1.0), (3 + row, -1.0)])
    _fit_scale(unet, last.time_emb_proj, width)
    for norm in (last.norm1, last.norm2, unet.conv_norm_out):
        _undo(unet, norm)


def _undo(unet, norm) -> None:
    """Let a norm of one group change nothing in a picture of usual brightness."""
    seen: list = []
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    clean, guide, _ = draw(8, np.random.default_rng(0), SIDE // 2)
    t, none = torch.arange(100, 1000, 120), torch.zeros(8, dtype=torch.long)
    clean, guide, noise = clean.cpu(), guide.cpu(), torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = noised(clean, noise, t, tables()[0])
    unet(torch.cat([noisy, guide], dim=1), t, torch.zeros(8, 1, unet.config.cross_attention_dim), class_labels=none)
    hook.remove()
    norm.weight.fill_(seen[0].flatten(1).std(dim=1).mean())
    norm.bias.add_(seen[0].mean())


def _blind(layer, columns) -> None:
    """Let the layer not see these channels of its input."""
    layer.weight[:, list(columns)] = 0


@torch.enable_grad()
def _fit_scale(unet, projection, width: int) -> None:
    """Let a residual block's scale of both pictures' channels be `linear_estimate`'s c and d, and their shift 0.

    The level is not looked at yet; training teaches it.
    """
    torch.nn.init.zeros_(unet.class_embedding.linear_2.weight)
    torch.nn.init.zeros_(unet.class_embedding.linear_2.bias)
    t = torch.arange(1000)
    wanted = torch.stack(linear_estimate(t, torch.zeros_like(t)), dim=1) - 1
    weight = (1 - tables()[0])[:, None]  # as in the loss
    head = torch.nn.Linear(projection.in_features, 2)
    steps_of_t, fitted = unet.time_proj(t), [*unet.time_embedding.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(fitted, lr=1e-2)
    for step in range(FIT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * pace(step / FIT_STEPS, step)
        features = torch.nn.functional.silu(unet.time_embedding(steps_of_t))
        optimizer.zero_grad()
        (weight * (head(features) - wanted).square()).mean().backward()
        optimizer.step()
    unet.zero_grad(set_to_none=True)
    with torch.no_grad():
        projection.weight[width : width + 12], projection.bias[width : width + 12] = 0, 0
        for row in range(12):
            projection.weight[row], projection.bias[row] = head.weight[row % 6 // 3], head.bias[row % 6 // 3]


def load(folder: Path) -> tuple:
    """(Models, tokenizer) of a pipeline folder, in fp32."""
    from diffusers import IFSuperResolutionPipeline

    pipe = IFSuperResolutionPipeline.from_pretrained(folder)
    return Models(pipe.unet, pipe.text_encoder).eval(), pipe.tokenizer


def build_tokenizer():
    """A `T5Tokenizer` of the base's whole words; single characters spell every other word."""
    from transformers import CLIPTokenizer, T5Tokenizer

    base = CLIPTokenizer.from_pretrained(BASE / "tokenizer").get_vocab()
    words = sorted((index, token[:-4]) for token, index in base.items() if token.endswith("</w>"))
    words = ["▁" + word for _, word in words if word.isascii() and word.isalnum()]
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    # A unigram model takes the split with the highest sum of scores: one word costs less than two characters.
    scores = {**dict.fromkeys(words, -1.0), **dict.fromkeys(characters, -10.0)}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *scores.items()], extra_ids=0)
    tokenizer.model_max_length = TOKENS
    return tokenizer


@cache
def build_schedulers() -> tuple:
    """(scheduler, image_noising_scheduler) of the pipeline, both DDPM; the second one is IF's own.

    The first one's linear betas are noisier than IF's cosine: the guide says nearly everything, so most steps may as
    well see little else.
    """
    from diffusers import DDPMScheduler

    sampling = DDPMScheduler(
        beta_schedule="linear", prediction_type="v_prediction", variance_type="fixed_small", timestep_spacing="trailing"
    )
    return sampling, DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def tables() -> tuple:
    """The cumulative products of the alphas, of the noisy picture and of the guide."""
    return tuple(scheduler.alphas_cumprod for scheduler in build_schedulers())


def reduced(picture: Image.Image, kernel=Image.Resampling.BOX) -> Image.Image:
    """The low picture, of half the side, of a high one."""
    return picture.resize((picture.width // 2, picture.height // 2), kernel)


def enlarged(low: Image.Image) -> Image.Image:
    """The low picture at twice its side, by PIL's bicubic filter: what the pipeline is given.

    IF's pipeline enlarges what it is given bilinearly with aligned corners, which moves the picture by up to half a
    pixel, otherwise at each place. A picture that has the full size already is not changed by that.
    """
    return low.resize((2 * low.width, 2 * low.height), Image.Resampling.BICUBIC)


def to_tensor(images: list) -> torch.Tensor:
    """PIL pictures of one size as (N, 3, H, W) in [-1, 1], on the training device."""
    return pool.to_tensor(np.stack([np.asarray(image) for image in images]))


def draw(count: int, rng, side: int = SIDE) -> tuple:
    """(high, guide, captions) of `count` new training scenes: (N, 3, side, side) in [-1, 1], the same, list."""
    scenes = [world.scene(int(seed), side=side) for seed in rng.integers(pool.HELD_OUT_SEED, size=count)]
    guides = [enlarged(reduced(picture, FILTERS[int(rng.integers(len(FILTERS)))])) for picture, _, _ in scenes]
    return to_tensor([picture for picture, _, _ in scenes]), to_tensor(guides), [scene[1] for scene in scenes]


def noised(x: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """sqrt(a) x + sqrt(1 - a) noise, with a = `table`[steps], the cumulative product of the alphas."""
    a = table[steps, None, None, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


def train(work: Path, minutes: float, batch: int = 2, lr: float = 1.5e-4, small: float = 0.4) -> None:
    """Train with mean (1 - a) |v - v_theta|^2 on scenes that are drawn for it; checkpoint `work`/upscaler.pt.

    batch: pictures of one crew member. small: the share of the minutes, at the start, in which scenes have half the
    side and a step has four times as many for the same time. Never crops: norms see other statistics in them.
    """
    tokenizer, (table, level_table) = build_tokenizer(), (table.to(device()) for table in tables())
    torch.manual_seed(6)
    model = build(len(tokenizer))
    if weights(work, "upscaler") is None:
        start_as_enlargement(model.unet)
    model = model.to(device(), memory_format=torch.channels_last)
    trainer = Trainer("upscaler", model, work, minutes, lr, ema=0.995)
    torch.manual_seed(1000 * trainer.step + crew_rank())
    held = held_out(8)

    def loss_of_step(step):
        rng = stream_of(6, step)
        early = trainer.spent_s < small * 60 * minutes
        side, count = (SIDE // 2, 4 * batch) if early else (SIDE, batch)
        clean, guide, captions = draw(count, rng, side)
        # The square favours low levels: they are what a cascade is tuned and sampled at.
        levels = torch.from_numpy((LEVELS * rng.random(count) ** 2).astype(np.int64)).to(device())
        t, noise = torch.from_numpy(timesteps(count, rng)).to(device()), torch.randn_like(clean)
        guide = noised(guide, torch.randn_like(guide), levels, level_table)
        tokens = tokens_of(tokenizer, captions)
        with autocast():
            prediction = trainer.model(noised(clean, noise, t, table), guide, t, levels, tokens)
        target = noised(noise, -clean, t, table)  # v = sqrt(a) noise - sqrt(1 - a) x_0 (arXiv 2202.00512)
        # An error of v is one of x_0 divided by sqrt(1 - a). Weighted so, all t count alike as errors of the picture.
        error = (1 - table[t]) * (prediction.float() - target).square().mean(dim=(1, 2, 3))
        return error.mean(), {"noisy_half": error[t >= 500].mean()}

    def watch(average, step):
        return {"held_psnr": float(psnr(sample(average, tokenizer, *held[1:]), held[0]).mean())}

    trainer.run(loss_of_step, every=200, watch=watch)


def tokens_of(tokenizer, captions: list) -> torch.Tensor:
    """Token ids (N, TOKENS) of the captions, in lower case as IF's pipelines write them."""
    texts = [caption.lower().strip() for caption in captions]
    rows = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True)["input_ids"]
    return torch.tensor(rows, device=device())


def held_out(count: int, split: str = "heldout") -> tuple:
    """(high, guide, captions) as `draw` returns them, of scenes that no training sees."""
    scenes = [world.scene(pool.HELD_OUT_SEED + index, split, SIDE) for index in range(count)]
    high = to_tensor([picture for picture, _, _ in scenes])
    return high, to_tensor([enlarged(reduced(picture)) for picture, _, _ in scenes]), [scene[1] for scene in scenes]


def pipeline(models: Models, tokenizer):
    """The stock `IFSuperResolutionPipeline` of the models."""
    from diffusers import IFSuperResolutionPipeline

    scheduler, noising = build_schedulers()
    pipe = IFSuperResolutionPipeline(
        tokenizer=tokenizer,
        text_encoder=models.text,
        unet=models.unet,
        scheduler=scheduler,
        image_noising_scheduler=noising,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(models: Models, tokenizer, guide: torch.Tensor, captions: list, level: int = 0, steps: int = STEPS):
    """The enlarged pictures (N, 3, 128, 128) in [-1, 1] of guides, by the stock pipeline without guidance; seed 0."""
    call = {"guidance_scale": 1.0, "num_inference_steps": steps, "noise_level": level, "clean_caption": False}
    generator = torch.Generator(guide.device).manual_seed(0)
    return pipeline(models, tokenizer)(
        captions, image=guide, generator=generator, output_type="pt", **call
    ).images.clamp(-1, 1)


def psnr(pictures: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The peak signal-to-noise ratio (N,), in dB, of pictures in [-1, 1] to the true ones."""
    return -10 * ((pictures - true) / 2).square().mean(dim=(1, 2, 3)).log10()
