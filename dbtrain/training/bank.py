"""Where data meets the model: a subject's images as cached VAE moments or stored bytes, and its captions.

A bank holds one subject's instance and prior samples. `Bank.batch` is a pure function of (step, slots). Which sample is
drawn, whether it is mirrored and where it is cropped come from counter-based randomness, so all of that is the same at
any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dbtrain.data.images import flip, open_photo, square, to_pixels
from dbtrain.data.index import order
from dbtrain.data.masks import factors, open_mask
from dbtrain.engines.world import together
from dbtrain.errors import ConfigError, DataError, StopRequested
from dbtrain.models.family import Codec, Family, Models, Tokens, low_side
from dbtrain.models.load import base_digest
from dbtrain.models.sampling import sampling_mode
from dbtrain.priors.draw import make_priors
from dbtrain.priors.store import PriorKey, prior_key, prior_moments, read_priors
from dbtrain.randomness import Purpose, stream_key, uniforms
from dbtrain.settings.config import DataConfig, PriorConfig, RunConfig
from dbtrain.subjects.prompts import fill
from dbtrain.training.session import Base, ClassPriors, Watch, Work
from dbtrain.values import OWN, Batch, Conditioning, Role, Sample, Subject, sent


@dataclass(frozen=True)
class Item:
    """One stored image of a bank and the caption it trains under."""

    sample: Sample
    caption: str


Crop = tuple[float, float]
"""Where a crop lies within the spare room: see `square`."""


class Bank:
    """A subject's samples by role, drawn by (step, slot).

    moments: float32 [n, variants, 2C, h, w] by role on the device; empty where pixels are made each step; variant 1 is
    the mirror image. texts: every distinct caption once, and the empty one where captions are dropped. cell: pixels of
    a side for one latent cell, for masks. low: pixels of a side of the small pictures that a denoiser enlarges; 0 where
    there are none. lows: those pictures, [n, variants, 3, low, low] by role, where moments are kept too.
    """

    def __init__(
        self,
        items: dict[Role, list[Item]],
        data: DataConfig,
        seed: int,
        subject: str,
        batch: int,
        cell: int = 8,
        low: int = 0,
    ):
        self.items, self.data, self.seed, self.subject, self.batch_size = items, data, seed, subject, batch
        self.key = stream_key(seed, subject)
        self.texts = list(dict.fromkeys(item.caption for role in items for item in items[role]))
        if data.caption_dropout and "" not in self.texts:
            self.texts.append("")
        self.moments: dict[Role, Tensor] = {}
        self.low, self.lows = low, dict[Role, Tensor]()
        self.sizes = {
            role: torch.tensor([_size_ids(item.sample, data.resolution) for item in group], dtype=torch.float32)
            for role, group in items.items()
        }
        self.caption_rows = {
            role: torch.tensor([self.texts.index(item.caption) for item in group]) for role, group in items.items()
        }
        self.cell = cell
        self.masks = self._center_masks() if data.crop == "center" else None
        self.readers = ThreadPoolExecutor(2)

    def reduce(self, role: Role) -> None:
        """Keep the small pictures of a role's images, and of their mirror images if samples are flipped."""
        arrays = [square(open_photo(item.sample.image), self.data.resolution) for item in self.items[role]]
        variants = [arrays, [flip(array) for array in arrays]] if self.data.flip else [arrays]
        self.lows[role] = torch.stack([torch.stack([small(a, self.low) for a in variant]) for variant in variants], 1)

    def small_photos(self) -> list[Image.Image]:
        """The subject's photos, reduced to the low resolution: what there is to enlarge where nothing else is."""
        photos = (open_photo(item.sample.image) for item in self.items[Role.INSTANCE])
        return [Image.fromarray(square(photo, self.low)) for photo in photos]

    def cache(self, role: Role, codec: Codec, vae: nn.Module | None, device: str) -> Tensor:
        """The moments of a role's images (and of their mirror images if samples are flipped), encoded once."""
        arrays = [square(open_photo(item.sample.image), self.data.resolution) for item in self.items[role]]
        variants = [arrays, [flip(array) for array in arrays]] if self.data.flip else [arrays]
        encoded = [encode_all(codec, vae, [to_pixels(array) for array in variant], device) for variant in variants]
        self.moments[role] = torch.stack(encoded, 1)
        return self.moments[role]

    def batch(self, step: int, instance_slots: Sequence[int], device: str) -> Batch:
        """The micro-batch of these instance draw slots and, where there are priors, as many prior slots."""
        return self.draw(step, instance_slots).sent(device)

    def draw(self, step: int, instance_slots: Sequence[int]) -> Batch:
        """The same micro-batch without a move: cached moments on their device, everything else on the CPU."""
        parts = [
            self._draw(role, step, torch.tensor([slot + int(role) * self.batch_size for slot in instance_slots]))
            for role in self.items
        ]
        return join_batches(parts)

    def _draw(self, role: Role, step: int, slot_B: Tensor) -> Batch:
        items = self.items[role]
        positions = step * self.batch_size + slot_B - int(role) * self.batch_size
        first = int(positions.min())
        span = order(len(items), first, int(positions.max()) - first + 1, self.seed, self.subject, role)
        pick_B = torch.tensor([span[int(position) - first] for position in positions])
        flip_B = (
            (uniforms(self.key, Purpose.FLIP, step, slot_B) < 0.5)
            if self.data.flip
            else torch.zeros(len(slot_B), dtype=torch.bool)
        )
        crops = [(0.5, 0.5)] * len(slot_B)
        if self.data.crop == "random":
            top_B, left_B = (uniforms(self.key, Purpose.CROP, step, 2 * slot_B + axis) for axis in (0, 1))
            crops = list(zip(top_B.tolist(), left_B.tolist()))
        images, sizes, lows = self._images(role, crops, pick_B, flip_B)
        masks = self._masks(role, crops, pick_B, flip_B)
        caption_B = self.caption_rows[role][pick_B]
        if self.data.caption_dropout and role == Role.INSTANCE:
            dropped_B = uniforms(self.key, Purpose.CAPTION, step, slot_B) < self.data.caption_dropout
            caption_B = torch.where(dropped_B, self.texts.index(""), caption_B)
        role_B = torch.full_like(slot_B, int(role))
        return Batch(images, caption_B, role_B, slot_B, sizes, mask_B1HW=masks, low_BCHW=lows)

    @property
    def masked(self) -> bool:
        """Whether any photo has a mask."""
        return any(item.sample.mask is not None for item in self.items.get(Role.INSTANCE, ()))

    def _center_masks(self) -> Tensor | None:
        """Factors [n, 2, 1, h, w] of all photos and their mirror images under the center crop; None without masks."""
        if not self.masked:
            return None
        ways = [[self._mask(item, (0.5, 0.5), way) for way in (False, True)] for item in self.items[Role.INSTANCE]]
        return torch.stack([torch.stack(way) for way in ways])

    def _masks(self, role: Role, crops: Sequence[Crop], pick_B: Tensor, flip_B: Tensor) -> Tensor | None:
        """Factors [B, 1, h, w] of photos; None for priors, and where no photo has a mask."""
        if role != Role.INSTANCE or not self.masked:
            return None
        if self.masks is not None:
            return self.masks[pick_B, flip_B.long()]
        work = zip(pick_B.tolist(), crops, flip_B.tolist())
        return torch.stack([self._mask(self.items[role][pick], crop, mirrored) for pick, crop, mirrored in work])

    def _mask(self, item: Item, crop: Crop, mirrored: bool) -> Tensor:
        side = self.data.resolution
        if item.sample.mask is None:
            return torch.ones(1, side // self.cell, side // self.cell)
        array = square(open_mask(item.sample.mask), side, crop)
        return factors(flip(array) if mirrored else array, self.cell, self.data.mask_floor)

    def _images(
        self, role: Role, crops: Sequence[Crop], pick_B: Tensor, flip_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Moments or pixels, sizes, and the small picture of the same crop where a denoiser enlarges."""
        if role in self.moments:
            moments = self.moments[role]
            # If the host waited for this copy, it would also wait until the step before has ended.
            pick, flipped = sent(torch.stack([pick_B, flip_B.long()]), moments.device)
            lows = self.lows[role][pick_B, flip_B.long()] if self.low else None
            return moments[pick, flipped], self.sizes[role][pick_B], lows
        work = [
            (self.items[role][pick], crop, mirrored)
            for pick, crop, mirrored in zip(pick_B.tolist(), crops, flip_B.tolist())
        ]
        arrays = list(self.readers.map(lambda job: self._array(*job), work))
        lows = torch.stack([small(array, self.low) for array in arrays]) if self.low else None
        sizes = torch.tensor([_size_ids(item.sample, self.data.resolution, crop) for item, crop, _ in work])
        return torch.stack([to_pixels(array) for array in arrays]), sizes, lows

    def _array(self, item: Item, crop: Crop, mirrored: bool) -> np.ndarray:
        array = square(open_photo(item.sample.image), self.data.resolution, crop)
        return flip(array) if mirrored else array


def small(array: np.ndarray, side: int) -> Tensor:
    """Pixels [3, side, side] in [-1, 1] of a crop [H, W, 3], reduced: a large and a small picture of one crop."""
    return to_pixels(square(Image.fromarray(array), side))


def join_batches(parts: Sequence[Batch]) -> Batch:
    """One batch of the samples of several, in order, without `subject_B`. Parts without masks get factors of 1 beside
    parts with masks."""
    names = [name for name in Batch.__dataclass_fields__ if name not in ("subject_B", "mask_B1HW")]
    held = [name for name in names if getattr(parts[0], name) is not None]
    joined = Batch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in held})
    some = next((part.mask_B1HW for part in parts if part.mask_B1HW is not None), None)
    if some is None:
        return joined
    return replace(joined, mask_B1HW=torch.cat([_factors_of(part, some) for part in parts]))


def _factors_of(part: Batch, like: Tensor) -> Tensor:
    """The factors of a batch's samples; 1 for each, in the shape of `like`, where it has no masks."""
    return like.new_ones(len(part.slot_B), *like.shape[1:]) if part.mask_B1HW is None else part.mask_B1HW


def _size_ids(sample: Sample, resolution: int, crop: tuple[float, float] = (0.5, 0.5)) -> list[float]:
    """Original height and width, crop top and left in the resized image, target height and width, in pixels."""
    height, width = sample.meta.get("height", resolution), sample.meta.get("width", resolution)
    scale = resolution / min(height, width)
    spare = [max(0, round(side * scale) - resolution) for side in (height, width)]
    offsets = [min(int(share * (room + 1)), room) for share, room in zip(crop, spare)]
    return [float(value) for value in (height, width, *offsets, resolution, resolution)]


@torch.no_grad()
def encode_all(codec: Codec, vae: nn.Module | None, images: Sequence[Tensor], device: str, batch: int = 8) -> Tensor:
    """VAE moments [n, 2C, h, w] of n images [3, H, W], encoded `batch` at a time."""
    chunks = [torch.stack(images[start : start + batch]) for start in range(0, len(images), batch)]
    return torch.cat([codec.encode(vae, chunk.to(device)) for chunk in chunks])


@torch.no_grad()
def captions_of(
    family: Family, models: Models, config: RunConfig, texts: Sequence[str], device: str
) -> Conditioning | Tokens:
    """The captions as conditioning (encoded once, in fp32), or as tokens to encode anew each step."""
    tokens = tuple(ids.to(device) for ids in family.tokenize(models, texts))
    cached = config.data.cache_text and not config.train.text_encoder
    return family.encode_tokens(models.text_encoders, tokens) if cached else tokens


ClassImages = Callable[[Base, Work, Watch, RunConfig, PriorKey], list[Sample]]
"""How the prior images of a class are got: `complete_priors` or `stored_priors`."""


def fill_bank(
    base: Base,
    work: Work,
    watch: Watch,
    subject: Subject,
    config: RunConfig,
    instances: Sequence[Sample],
    class_images: ClassImages,
) -> Bank:
    """A subject's photos and its class's priors, with captions, encoded if latents are cached."""
    data = config.data
    identifier = work.identifiers[subject.id]
    items = {Role.INSTANCE: [Item(one, _caption(one, subject, data.caption, identifier)) for one in instances]}
    if config.prior.weight > 0:
        key = prior_key(config, base.models, subject.class_noun)
        wanted = (key, config.prior.images)
        priors = base.class_priors.kept.get(wanted) or ClassPriors(class_images(base, work, watch, config, key))
        items[Role.PRIOR] = [Item(sample, key.prompt) for sample in priors.samples]
    low = low_side(config) if base.family.guide else 0
    bank = Bank(items, data, config.seed, subject.id, config.train.batch, base.family.codec.cell, low)
    if data.cache_latents and data.crop == "center":
        with watch.clock.stage("encode"):
            bank.cache(Role.INSTANCE, base.family.codec, base.models.vae, base.world.device)
            if Role.PRIOR in items and priors.moments is None:
                priors = replace(priors, moments=encode_priors(base, work, watch, config, key, priors.samples))
            for role in items if low else ():
                bank.reduce(role)
    if Role.PRIOR in items:
        if priors.moments is not None:
            bank.moments[Role.PRIOR] = priors.moments
        base.class_priors.keep(wanted, priors)
    return bank


def _caption(sample: Sample, subject: Subject, template: str, identifier: str) -> str:
    """A photo's caption: its own, else its subject's, else the run's."""
    own = sample.caption if sample.meta.get(OWN) else ""
    try:
        return fill(own or subject.caption or template, identifier=identifier, class_noun=subject.class_noun)
    except ConfigError as error:
        if not own:
            raise
        raise DataError(f"sample {sample.key}: {error}; make the shards again with another caption") from error


def encode_priors(
    base: Base, work: Work, watch: Watch, config: RunConfig, key: PriorKey, samples: Sequence[Sample]
) -> Tensor:
    """The encoded priors: read from the store, or encoded and kept there for other processes and later subjects."""
    vae, device = base.models.vae, base.world.device

    def encode(group: Sequence[Sample]) -> Tensor:
        watch.beat("encode")
        part = Bank({Role.PRIOR: [Item(sample, key.prompt) for sample in group]}, config.data, 0, "", 1)
        return part.cache(Role.PRIOR, base.family.codec, vae, device)

    about = {
        "base": base_digest(base.models),
        "dtype": "pixels" if vae is None else str(next(vae.parameters()).dtype),
        "resolution": config.data.resolution,
        "flip": config.data.flip,
        "device": device.partition(":")[0],
    }
    return prior_moments(work.priors, key, samples, about, encode).to(device)


def complete_priors(base: Base, work: Work, watch: Watch, config: RunConfig, key: PriorKey) -> list[Sample]:
    """A class's priors from the store. All ranks together first draw what is missing there, with the base as it is; a
    request to stop ends that early."""
    with watch.clock.stage("prior"):
        together(base.world, lambda: _draw_missing(base, work, watch, config.prior, key))
    return stored_priors(base, work, watch, config, key)


def stored_priors(base: Base, work: Work, watch: Watch, config: RunConfig, key: PriorKey) -> list[Sample]:
    """A class's priors from the store; DataError if they are not complete there."""
    with watch.clock.stage("prior"):
        return together(base.world, lambda: read_priors(work.priors, key, config.prior.images))


def _draw_missing(base: Base, work: Work, watch: Watch, prior: PriorConfig, key: PriorKey) -> None:
    with sampling_mode(base.models):
        make_priors(
            work.priors,
            key,
            prior.images,
            base.family,
            base.models,
            base.world,
            prior.batch,
            watch.say,
            stop=lambda: watch.stop.asked,
            beat=lambda: watch.beat("prior"),
        )
    if watch.stop.asked:
        raise StopRequested(f"stopped on request while drawing {key.prompt!r}; run the same command to go on")
