"""The upscaler of the embedded base, 64 -> 128 pixels: DeepFloyd IF's stage II in small, and its training.

The UNet sees the noisy high picture and, as its guide, the low picture, enlarged by a bicubic filter and noised to a
level that it is told. It predicts the clean picture, and begins as the guide itself: a path that carries the guide to
the output is set by hand and never trained, and everything that is trained adds nothing to it at first. The last three
of the six output channels are IF's learned variance; they stay zero and nothing reads them.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dbtrain.tiny import BASE, UPSCALER
from dbtrain_embedded import pool, world
from dbtrain_embedded.loops import Trainer, autocast, crew_rank, device, stream_of, weights

SIDE = 128
WIDTH = 32
"""Channels, all at full size: what a picture lacks beside its enlargement is near at hand."""
TOKENS = 77
"""Tokens of a caption: IF's pipelines pad every caption to this length."""
LEVELS = 250
"""The guide is noised to a level below this one; IF's pipeline samples at level 250 unless it is told another."""
STEPS = 1
"""Sampling steps. One from pure noise gives the mean of all high pictures that fit the low one, which PSNR rewards."""
CONSTANT = 64.0
"""Two opposite channels of this value are nearly all that a norm's deviation sees."""
RESIDUAL = 0.07
"""Usual deviation of a picture from its guide, in [-1, 1]."""
CROP, MARGIN = 36, 4
"""Pixels of a training crop's side, and of an edge where it lacks what is around it and has no part in the loss: as far
as `head` sees. Edges that are the picture's own lack nothing, and stay."""
BORDER = 8.0
"""Weight in the loss of a pixel near a picture's border: there are few, and in flat scenery their error is small, but a
line along the border is what a person sees."""
EVERY = 50
"""Steps between two lines of the log."""
FILTERS = (Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.BICUBIC)
"""How a low picture may be reduced; PIL widens each filter, so none of them aliases. dbtrain's is the first."""


def build(width: int = WIDTH):
    """An untrained `UNet2DConditionModel` of one level, which answers with the guide, whatever else it is shown."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=6,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(width,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=128,
        norm_num_groups=1,
        class_embed_type="timestep",
        resnet_time_scale_shift="scale_shift",
    )
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.fill_(_undoing(module))
        for block in unet.up_blocks[0].resnets:
            for layer in (block.conv2, block.conv_shortcut):
                layer.weight.zero_()
                layer.bias.zero_()
        unet.conv_out.bias.zero_()
        unet.conv_in.weight[:, :3] = 0  # pure noise, at most steps: what of it is of use is learnt
    hold(copying(unet) + steadying(unet))
    return unet


def copying(unet) -> list:
    """(parameter, index of its part, value) of everything that carries the guide to the output.

    The guide and its negative go through the first convolution, past the whole UNet by its last skip, and past the last
    block by its shortcut. silu(x) - silu(-x) = x, so the activation before the last convolution changes nothing.
    """
    last = unet.up_blocks[-1].resnets[-1]
    skip = last.conv_shortcut.in_channels - unet.conv_in.out_channels
    first, shortcut, out = (torch.zeros_like(each.weight) for each in (unet.conv_in, last.conv_shortcut, unet.conv_out))
    for row in range(6):
        sign = 1.0 if row < 3 else -1.0
        first[row, 3 + row % 3, 1, 1] = out[row % 3, row, 1, 1] = sign
        shortcut[row, skip + row] = 1.0
    copies, rest = slice(0, 6), slice(3, 6)
    return [
        (unet.conv_in.weight, copies, first[:6]),
        (unet.conv_in.bias, copies, 0),
        (last.conv2.weight, copies, 0),
        (last.conv2.bias, copies, 0),
        (last.conv_shortcut.weight, copies, shortcut[:6]),
        (last.conv_shortcut.bias, copies, 0),
        (unet.conv_norm_out.weight, copies, _undoing(unet.conv_norm_out)),
        (unet.conv_norm_out.bias, copies, 0),
        (unet.conv_out.weight, (slice(None), copies), out[:, :6]),
        (unet.conv_out.weight, rest, 0),
        (unet.conv_out.bias, rest, 0),
    ]


def _undoing(norm) -> float:
    """The weight with which a norm of one group changes nothing: the deviation that two opposite constants make."""
    return CONSTANT * (2 / norm.num_channels) ** 0.5


def steadying(unet) -> list:
    """(parameter, index of its part, value) of what makes all norms the same for every picture, and every crop of it.

    The last two channels of everything that a norm sees are opposite constants, so much larger than all others that
    they alone make its deviation. Behind a norm they are zero. Layers that see them otherwise have zeros for them.
    """
    first, others = unet.down_blocks[0].resnets[0], [*unet.up_blocks[0].resnets]
    pair, width = [-2, -1], unet.conv_in.out_channels
    values, both = torch.tensor([CONSTANT, -CONSTANT]), [width - 2, width - 1, -2, -1]
    parts: list = []
    layers = [unet.conv_in, *(block.conv1 for block in (first, *others)), *(block.conv_shortcut for block in others)]
    for layer in layers:
        parts += [(layer.weight, pair, 0), (layer.bias, pair, values)]
    for block in (first, *others):
        parts += [(block.conv2.weight, pair, 0), (block.conv2.bias, pair, 0)]
        parts += [(part, pair, 0) for part in (block.norm2.weight, block.norm2.bias)]
    for block in others:
        parts += [(block.conv_shortcut.weight, (slice(None), both), 0)]
    seen = [(first.norm1, pair), *((block.norm1, both) for block in others), (unet.conv_norm_out, pair)]
    return parts + [(part, channels, 0) for norm, channels in seen for part in (norm.weight, norm.bias)]


@torch.no_grad()
def hold(parts: list) -> None:
    """Write values into parts of parameters: what an optimizer did to them is undone."""
    for parameter, index, value in parts:
        parameter[index] = value.to(parameter) if isinstance(value, torch.Tensor) else value


def build_text():
    """The base's text encoder, frozen; captions are padded to `TOKENS`: its last position stands for those beyond."""
    from transformers import CLIPTextConfig, CLIPTextModel

    base = CLIPTextModel.from_pretrained(BASE / "text_encoder")
    state, name = base.state_dict(), next(key for key in base.state_dict() if "position_embedding" in key)
    beyond = TOKENS - len(state[name])
    state[name] = torch.cat([state[name], state[name][-1:].expand(beyond, -1)])
    text = CLIPTextModel(CLIPTextConfig(**{**base.config.to_dict(), "max_position_embeddings": TOKENS}))
    text.load_state_dict(state)
    return text.eval().requires_grad_(False).to(device())


def build_tokenizer():
    """The base's tokenizer, `TOKENS` long."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=TOKENS)


@cache
def build_schedulers() -> tuple:
    """(scheduler, image_noising_scheduler) of the pipeline: IF's cosine tables; the denoiser predicts the picture."""
    from diffusers import DDPMScheduler

    sampling = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        variance_type="fixed_small",
        timestep_spacing="trailing",
    )
    return sampling, DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def reduced(picture: Image.Image, kernel=FILTERS[0]) -> Image.Image:
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


def draw(count: int, rng) -> tuple:
    """(high, guide, captions) of `count` new training scenes: (N, 3, SIDE, SIDE) in [-1, 1], the same, list."""
    scenes = [world.scene(int(seed), side=SIDE) for seed in rng.integers(pool.HELD_OUT_SEED, size=count)]
    guides = [enlarged(reduced(picture, FILTERS[int(rng.integers(len(FILTERS)))])) for picture, _, _ in scenes]
    return to_tensor([picture for picture, _, _ in scenes]), to_tensor(guides), [scene[1] for scene in scenes]


def held_out(count: int, split: str = "heldout", kernel=FILTERS[0]) -> tuple:
    """(high, guide, captions) as `draw` returns them, of scenes that no training sees."""
    scenes = [world.scene(pool.HELD_OUT_SEED + index, split, SIDE) for index in range(count)]
    guides = [enlarged(reduced(picture, kernel)) for picture, _, _ in scenes]
    return to_tensor([picture for picture, _, _ in scenes]), to_tensor(guides), [scene[1] for scene in scenes]


def noised(x: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """sqrt(a) x + sqrt(1 - a) noise, with a = `table`[steps], the cumulative product of the alphas."""
    a = table[steps, None, None, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


def states_of(text, tokenizer, captions: list) -> torch.Tensor:
    """Text states (N, TOKENS, width) of the captions, in lower case, as IF's pipelines ask for them."""
    texts = [caption.lower().strip() for caption in captions]
    told = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").to(device())
    with torch.no_grad():
        return text(told.input_ids, attention_mask=told.attention_mask)[0]


def drawn_levels(count: int, rng) -> tuple:
    """(t, levels) of `count` samples: mostly the noisiest t, where sampling in one step asks, and level 0, at which a
    cascade is sampled; else any, low levels more often."""
    t = np.where(rng.random(count) < 0.7, 999, rng.integers(1000, size=count))
    levels = np.where(rng.random(count) < 0.75, 0, (LEVELS * rng.random(count) ** 3).astype(np.int64))
    return torch.from_numpy(t).to(device()), torch.from_numpy(levels).to(device())


def crops(clean: torch.Tensor, guide: torch.Tensor, each: int, side: int) -> tuple:
    """(clean, guide, weight) of `each` crops of every picture, (N, 3, side, side) and (N, 1, side, side).

    Places are drawn in proportion to the guide's error there, and more often along the picture's border. weight: of the
    pixels in the loss. It is 0 where not all that `head` sees of the picture is in the crop, and `BORDER` near the
    picture's own border.
    """
    error = torch.nn.functional.avg_pool2d((clean - guide).square().mean(dim=1), side, MARGIN)
    odds = error + 0.1 * error.mean() + 1e-6
    odds[:, [0, -1]] += error.mean()
    odds[:, :, [0, -1]] += error.mean()
    places = torch.multinomial(odds.flatten(1), each, replacement=True)
    across = odds.shape[-1]
    axes = [_axis((MARGIN * way).flatten(), side, length)
            for way, length in zip((places // across, places % across), clean.shape[-2:], strict=True)]  # fmt: skip
    (rows, whole_rows, near_rows), (columns, whole_columns, near_columns) = axes
    picture = torch.arange(len(clean), device=clean.device).repeat_interleave(each)[:, None, None]
    cut = [of[picture, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2) for of in (clean, guide)]
    near = near_rows[:, :, None] | near_columns[:, None]
    weight = (whole_rows[:, :, None] & whole_columns[:, None]) * torch.where(near, BORDER, 1.0)
    return cut[0], cut[1], weight[:, None]


def _axis(starts: torch.Tensor, side: int, length: int) -> tuple:
    """Of the pixels of crops along one axis, (N, side): their place in the picture; whether they lie at least `MARGIN`
    from each end of the crop that is no end of the picture; whether they lie less than `MARGIN` from an end of it."""
    within = torch.arange(side, device=starts.device)
    at = starts[:, None] + within
    first, last = starts[:, None] == 0, starts[:, None] + side == length
    whole = ((within >= MARGIN) | first) & ((within < side - MARGIN) | last)
    return at, whole, (at < MARGIN) | (at >= length - MARGIN)


def head(unet, shown: torch.Tensor, t: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """What the UNet says while only its first and its last layers do anything, at a third of the cost."""
    last = unet.up_blocks[0].resnets[-1]
    told = unet.time_embedding(unet.time_proj(t)) + unet.class_embedding(unet.time_proj(levels))
    skip = unet.conv_in(shown)
    rest = torch.zeros_like(skip)
    rest[:, -2], rest[:, -1] = CONSTANT, -CONSTANT
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(last(torch.cat([rest, skip], dim=1), told))))


def train(work: Path, minutes: float, lr: float = 2e-3, batch: int = 2, each: int = 8) -> None:
    """Train what `head` uses, on scenes that are drawn for it; checkpoint `work`/upscaler.pt.

    A step has `each` crops of `batch` pictures, where their guides are most wrong. The loss is mean |x_0 - f|^2, less
    where the guide is so noisy that its error is larger than enlargement's own.
    """
    torch.manual_seed(6)
    unet = build().requires_grad_(False)
    last = unet.up_blocks[0].resnets[-1]
    for module in (unet.conv_in, unet.time_embedding, unet.class_embedding, last, unet.conv_norm_out, unet.conv_out):
        module.requires_grad_(True)
    tables = [scheduler.alphas_cumprod.to(device()) for scheduler in build_schedulers()]
    trainer = Trainer("upscaler", unet.to(device()), work, minutes, lr, muon=True, ema=0.995)
    torch.manual_seed(1000 * trainer.step + crew_rank())
    parts, (high, clear, _) = copying(unet) + steadying(unet), held_out(12)

    def loss_of_step(step):
        hold(parts)
        rng = stream_of(6, step)
        clean, guide, weight = crops(*draw(batch, rng)[:2], each, CROP)
        t, levels = drawn_levels(len(clean), rng)
        noisy = noised(clean, torch.randn_like(clean), t, tables[0])
        guide = noised(guide, torch.randn_like(guide), levels, tables[1])
        with autocast():
            found = head(trainer.model, torch.cat([noisy, guide], dim=1), t, levels)[:, :3]
        error = ((found.float() - clean).square() * weight).mean(dim=(1, 2, 3))
        error = error / (weight > 0).float().mean(dim=(1, 2, 3))
        share = RESIDUAL**2 / (RESIDUAL**2 + 1 / tables[1][levels] - 1)
        return (share * error).mean(), {}

    def watch(average, step):
        noise, last = torch.zeros_like(clear), torch.full((len(clear),), 999, device=device())
        found = head(average, torch.cat([noise, clear], dim=1), last, torch.zeros_like(last))[:, :3].clamp(-1, 1)
        measures = {"psnr": psnr, "border": border_error}
        pictures = {"held": found, "bicubic": clear}
        return {
            f"{of}_{name}": float(measures[name](pictures[of], high).mean()) for of in pictures for name in measures
        }

    trainer.run(loss_of_step, every=EVERY, watch=watch)


def pipeline(unet, text, tokenizer):
    """The stock `IFSuperResolutionPipeline` of the models."""
    from diffusers import IFSuperResolutionPipeline

    scheduler, noising = build_schedulers()
    pipe = IFSuperResolutionPipeline(
        tokenizer=tokenizer,
        text_encoder=text,
        unet=unet,
        scheduler=scheduler,
        image_noising_scheduler=noising,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(work: Path, folder: Path = UPSCALER) -> None:
    """Write the pipeline of the checkpoint in `work` to `folder`, in fp16."""
    unet = build()
    unet.load_state_dict(weights(work, "upscaler"))
    hold(copying(unet) + steadying(unet))  # the average is of values before they were put back
    pipeline(unet.half(), build_text().half(), build_tokenizer()).save_pretrained(folder)


@torch.no_grad()
def sample(pipe, guide: torch.Tensor, captions: list, level: int = 0, steps: int = STEPS) -> torch.Tensor:
    """The enlarged pictures (N, 3, SIDE, SIDE) in [-1, 1] of guides, by the stock pipeline without guidance; seed 0."""
    call = {"guidance_scale": 1.0, "num_inference_steps": steps, "noise_level": level, "clean_caption": False}
    generator = torch.Generator(guide.device).manual_seed(0)
    return pipe(captions, image=guide, generator=generator, output_type="pt", **call).images.clamp(-1, 1)


def psnr(pictures: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The peak signal-to-noise ratio (N,), in dB, of pictures in [-1, 1] to the true ones."""
    return -10 * ((pictures - true) / 2).square().mean(dim=(1, 2, 3)).log10()


def border_error(pictures: torch.Tensor, true: torch.Tensor, width: int = MARGIN) -> torch.Tensor:
    """The root mean square error (N,), of 255, of the pixels that are less than `width` from a picture's border."""
    error, inner = (pictures - true).square().mean(dim=1), slice(width, -width)
    count = error[0].numel() - error[0, inner, inner].numel()
    border = error.sum(dim=(1, 2)) - error[:, inner, inner].sum(dim=(1, 2))
    return 127.5 * (border.clamp(min=0) / count).sqrt()
