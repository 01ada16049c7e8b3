"""Where data meets the model: a subject's images as cached VAE moments or stored bytes, and its captions.

A bank holds one subject's instance and prior samples. `Bank.batch` is a pure function of (step, slots). Which sample is
drawn, whether it is mirrored and where it is cropped come from counter-based randomness, so all of that is the same at
any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dbtrain.data.buckets import Shape, shape_of, size_ids
from dbtrain.data.images import fit, flip, open_photo, picture_size, square, to_pixels
from dbtrain.data.index import order
from dbtrain.data.masks import factors, open_mask
from dbtrain.engines.world import together
from dbtrain.errors import ConfigError, DataError, StopRequested
from dbtrain.models.family import Codec, Family, Models, Tokens, encode_texts, low_side
from dbtrain.models.load import base_digest
from dbtrain.models.sampling import sampling_mode
from dbtrain.models.texts import Group
from dbtrain.priors.draw import lacks_priors, make_priors
from dbtrain.priors.store import PriorKey, prior_key, prior_moments, read_priors
from dbtrain.randomness import Purpose, stream_key, uniforms
from dbtrain.results.record import looks_finished
from dbtrain.settings.config import DataConfig, PriorConfig, RunConfig
from dbtrain.subjects.prompts import fill
from dbtrain.training.identity import subject_config
from dbtrain.training.session import Base, ClassPriors, Watch, Work, drawn_texts
from dbtrain.values import OWN, Batch, Conditioning, Role, Sample, Subject, sent


@dataclass(frozen=True)
class Item:
    """One stored image of a bank and the caption it trains under."""

    sample: Sample
    caption: str


Crop = tuple[float, float]
"""Where a crop lies within the spare room: see `fit`."""


class Bank:
    """A subject's samples by role, drawn by (step, slot).

    shapes: of each photo, one for all without `data.buckets`. A prior is drawn in the shape of the photo beside it.
    moments: float32 [n, variants, 2C, h, w] by role and shape on the device; empty where pixels are made each step;
    variant 1 is the mirror image. texts: every distinct caption once, and the empty one where captions are dropped.
    cell: pixels of a side for one latent cell, for masks. multiple: see `shape_of`. low: pixels of a side of the small
    pictures that a denoiser enlarges, of a square; 0 where there are none. lows: those pictures [n, variants, 3, h, w]
    by role and shape, where moments are kept too. held: photos, the last ones, that training does not draw.
    """

    def __init__(
        self,
        items: dict[Role, list[Item]],
        data: DataConfig,
        seed: int,
        subject: str,
        batch: int,
        cell: int = 8,
        multiple: int = 8,
        low: int = 0,
    ):
        self.items, self.data, self.seed, self.subject, self.batch_size = items, data, seed, subject, batch
        self.key = stream_key(seed, subject)
        self.texts = distinct((item.caption for role in items for item in items[role]), data)
        photos = [item.sample.image for item in items.get(Role.INSTANCE, ())]
        self.shapes = [shape_of(picture_size(photo) if data.buckets else (1, 1), data, multiple) for photo in photos]
        self.held, self.low = 0, low
        self.moments, self.lows = dict[tuple[Role, Shape], Tensor](), dict[tuple[Role, Shape], Tensor]()
        self.sizes = {
            (role, shape): torch.tensor([_size_ids(item.sample, shape) for item in self.shaped(role, shape)])
            for role in items
            for shape in self.kinds
        }
        self.caption_rows = {
            role: torch.tensor([self.texts.index(item.caption) for item in group]) for role, group in items.items()
        }
        self.cell = cell
        self.masks = self._center_masks() if data.crop == "center" else None
        self.readers = ThreadPoolExecutor(2)

    @property
    def kinds(self) -> tuple[Shape, ...]:
        """The distinct shapes of the photos."""
        return tuple(dict.fromkeys(self.shapes))

    def shaped(self, role: Role, shape: Shape) -> list[Item]:
        """The images of a role that are drawn in a shape: each prior, and the photos of that shape."""
        items = self.items[role]
        return [items[n] for n, own in enumerate(self.shapes) if own == shape] if role == Role.INSTANCE else items

    def reduce(self, role: Role, shape: Shape) -> None:
        """Keep the small pictures of a role's images in a shape, and of their mirror images if samples are flipped."""
        variants = self._variants(role, shape)
        self.lows[role, shape] = torch.stack([torch.stack(list(map(self._small, arrays))) for arrays in variants], 1)

    def small_photos(self) -> list[Image.Image]:
        """The subject's photos, reduced to the low resolution: what there is to enlarge where nothing else is."""
        return [Image.fromarray(square(open_photo(item.sample.image), self.low)) for item in self.items[Role.INSTANCE]]

    def cache(self, role: Role, shape: Shape, codec: Codec, vae: nn.Module | None, device: str) -> Tensor:
        """The moments of a role's images in a shape, and of their mirror images if samples are flipped."""
        variants = self._variants(role, shape)
        encoded = [encode_all(codec, vae, [to_pixels(array) for array in variant], device) for variant in variants]
        return self.moments.setdefault((role, shape), torch.stack(encoded, 1))

    def batch(self, step: int, instance_slots: Sequence[int], device: str) -> Batch:
        """The micro-batch of these instance draw slots and, where there are priors, as many prior slots."""
        return self.draw(step, instance_slots).sent(device)

    def draw(self, step: int, instance_slots: Sequence[int]) -> Batch:
        """The same micro-batch without a move: cached moments on their device, everything else on the CPU.

        The photos must share a shape. Where those of a subject do not, a micro-batch is one photo and its prior.
        """
        slots = {role: torch.tensor([slot + int(role) * self.batch_size for slot in instance_slots]) for role in Role}
        picks = {role: self._picks(role, step, slots[role]) for role in self.items}
        (shape,) = {self.shapes[pick] for pick in picks[Role.INSTANCE].tolist()}
        return join_batches([self.drawn(role, step, slots[role], picks[role], shape) for role in self.items])

    def _picks(self, role: Role, step: int, slot_B: Tensor) -> Tensor:
        """Which image of a role each draw slot of a step gets."""
        positions = step * self.batch_size + slot_B - int(role) * self.batch_size
        first = int(positions.min())
        count = len(self.items[role]) - (self.held if role == Role.INSTANCE else 0)
        span = order(count, first, int(positions.max()) - first + 1, self.seed, self.subject, role)
        return torch.tensor([span[int(position) - first] for position in positions])

    def drawn(self, role: Role, step: int, slot_B: Tensor, pick_B: Tensor, shape: Shape) -> Batch:
        """The picked images of a role, mirrored and cropped as (step, slot) says."""
        flip_B = (
            (uniforms(self.key, Purpose.FLIP, step, slot_B) < 0.5)
            if self.data.flip
            else torch.zeros(len(slot_B), dtype=torch.bool)
        )
        crops = [(0.5, 0.5)] * len(slot_B)
        if self.data.crop == "random":
            top_B, left_B = (uniforms(self.key, Purpose.CROP, step, 2 * slot_B + axis) for axis in (0, 1))
            crops = list(zip(top_B.tolist(), left_B.tolist()))
        images, sizes, lows = self._images(role, shape, crops, pick_B, flip_B)
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

    def _center_masks(self) -> list[Tensor] | None:
        """Factors [2, 1, h, w] of each photo and its mirror image under the center crop; None without masks."""
        if not self.masked:
            return None
        return [torch.stack([self._mask(n, (0.5, 0.5), way) for way in (False, True)]) for n in range(len(self.shapes))]

    def _masks(self, role: Role, crops: Sequence[Crop], pick_B: Tensor, flip_B: Tensor) -> Tensor | None:
        """Factors [B, 1, h, w] of photos; None for priors, and where no photo has a mask."""
        if role != Role.INSTANCE or not self.masked:
            return None
        work = zip(pick_B.tolist(), crops, flip_B.tolist())
        if self.masks is not None:
            return torch.stack([self.masks[pick][int(mirrored)] for pick, _, mirrored in work])
        return torch.stack([self._mask(pick, crop, mirrored) for pick, crop, mirrored in work])

    def _mask(self, number: int, crop: Crop, mirrored: bool) -> Tensor:
        mask, shape = self.items[Role.INSTANCE][number].sample.mask, self.shapes[number]
        if mask is None:
            return torch.ones(1, *(side // self.cell for side in shape))
        array = fit(open_mask(mask), shape, crop)
        return factors(flip(array) if mirrored else array, self.cell, self.data.mask_floor)

    def _images(
        self, role: Role, shape: Shape, crops: Sequence[Crop], pick_B: Tensor, flip_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(moments or pixels [B, ...], sizes [B, 6], the small pictures of the same crops where a denoiser enlarges) of
        the picked images of a role in a shape."""
        if (role, shape) in self.moments:
            moments, row_B = self.moments[role, shape], self._rows(role, shape, pick_B)
            # If the host waited for this copy, it would also wait until the step before has ended.
            row, flipped = sent(torch.stack([row_B, flip_B.long()]), moments.device)
            lows = self.lows[role, shape][row_B, flip_B.long()] if self.low else None
            return moments[row, flipped], self.sizes[role, shape][row_B], lows
        work = [
            (self.items[role][pick], shape, crop, mirrored)
            for pick, crop, mirrored in zip(pick_B.tolist(), crops, flip_B.tolist())
        ]
        arrays = list(self.readers.map(lambda job: self._array(*job), work))
        lows = torch.stack([self._small(array) for array in arrays]) if self.low else None
        sizes = torch.tensor([_size_ids(item.sample, shape, crop) for item, _, crop, _ in work])
        return torch.stack([to_pixels(array) for array in arrays]), sizes, lows

    def _rows(self, role: Role, shape: Shape, pick_B: Tensor) -> Tensor:
        """Where the picked images lie among those of their role in a shape."""
        if role != Role.INSTANCE or len(self.kinds) == 1:
            return pick_B
        return torch.tensor([self.shapes[:pick].count(shape) for pick in pick_B.tolist()])

    def _variants(self, role: Role, shape: Shape) -> list[list[np.ndarray]]:
        """A role's images in a shape; after them the mirrored ones, if samples are flipped."""
        arrays = [fit(open_photo(item.sample.image), shape) for item in self.shaped(role, shape)]
        return [arrays, [flip(array) for array in arrays]] if self.data.flip else [arrays]

    def _array(self, item: Item, shape: Shape, crop: Crop, mirrored: bool) -> np.ndarray:
        array = fit(open_photo(item.sample.image), shape, crop)
        return flip(array) if mirrored else array

    def _small(self, array: np.ndarray) -> Tensor:
        """Pixels [3, h, w] in [-1, 1] of a crop [H, W, 3], reduced: a large and a small picture of one crop."""
        times = self.data.resolution // self.low
        return to_pixels(fit(Image.fromarray(array), (array.shape[0] // times, array.shape[1] // times)))


def distinct(captions: Iterable[str], data: DataConfig) -> list[str]:
    """Captions once each, and the empty one where captions are dropped."""
    return list(dict.fromkeys([*captions, *([""] if data.caption_dropout else [])]))


def join_batches(parts: Sequence[Batch]) -> Batch:
    """One batch of the samples of several, in order, without `subject_B`. A part without masks has factors of 1."""
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


def _size_ids(sample: Sample, shape: Shape, crop: Crop = (0.5, 0.5)) -> list[float]:
    """The six sizes of an image in a shape; where the original size is not known, it is that of the shape."""
    return size_ids((sample.meta.get("width", shape[1]), sample.meta.get("height", shape[0])), shape, crop)


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
    if config.data.cache_text and not config.train.text_encoder:
        if models.texts is not None:
            return models.texts.of(tuple(texts), device)
        return encode_texts(family, models, models.text_encoders, texts, device)
    return tuple(ids.to(device) for ids in family.tokenize(models, texts))


def texts_of_run(base: Base, work: Work, images: int | None = None) -> list[Group]:
    """The groups of texts that training the subjects of a work asks for: captions as their banks have them, and the
    prompts of class images and samples. images: of each prompt; None is `sample.images`."""
    settings = base.settings
    images = settings.sample.images if images is None else images
    groups: list[Group] = [("",)] if settings.engine.kind == "packed" else []
    for subject in (one for one in work.subjects if not looks_finished(work.folder(one))):
        config, identifier = subject_config(settings, subject), work.identifiers[subject.id]
        names = {"identifier": identifier, "class_noun": subject.class_noun}
        classes = [prior_key(config, base.models, subject.class_noun).prompt] if config.prior.weight > 0 else []
        given = [entry.caption or config.data.caption for entry in work.index.entries_of(subject.id)]
        try:
            groups.append(tuple(distinct([*(fill(text, **names) for text in given), *classes], config.data)))
            prompts = [fill(text, **names) for text in config.sample.prompts if images]
        except ConfigError:  # of this subject alone; its bank says it
            continue
        groups += drawn_texts(base, classes, config.prior.guidance) if classes else []
        groups += drawn_texts(base, prompts, config.sample.guidance) if prompts else []
    return groups


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
    codec, low = base.family.codec, low_side(config) if base.family.guide else 0
    bank = Bank(items, data, config.seed, subject.id, config.train.batch, codec.cell, codec.multiple, low)
    if data.cache_latents and data.crop == "center":
        with watch.clock.stage("encode"):
            for shape in bank.kinds:
                bank.cache(Role.INSTANCE, shape, codec, base.models.vae, base.world.device)
                if Role.PRIOR in items:
                    kept = priors.moments.get(shape)
                    if kept is None:
                        kept = encode_priors(base, work, watch, config, key, priors.samples, shape)
                    bank.moments[Role.PRIOR, shape] = kept
                for role in items if low else ():
                    bank.reduce(role, shape)
    if Role.PRIOR in items:
        # Shapes that only subjects before this one had leave the device; the store has them.
        moments = {shape: tensor for (role, shape), tensor in bank.moments.items() if role == Role.PRIOR}
        base.class_priors.keep(wanted, replace(priors, moments=moments))
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
    base: Base, work: Work, watch: Watch, config: RunConfig, key: PriorKey, samples: Sequence[Sample], shape: Shape
) -> Tensor:
    """The priors encoded in a shape: read from the store, or encoded and kept there for other processes and later
    subjects."""
    vae, device, side = base.models.vae, base.world.device, config.data.resolution

    def encode(group: Sequence[Sample]) -> Tensor:
        watch.beat("encode")
        part = Bank({Role.PRIOR: [Item(sample, key.prompt) for sample in group]}, config.data, 0, "", 1)
        return part.cache(Role.PRIOR, shape, base.family.codec, vae, device)

    about = {
        "base": base_digest(base.models),
        "dtype": "pixels" if vae is None else str(next(vae.parameters()).dtype),
        "resolution": side,
        "flip": config.data.flip,
        "device": device.partition(":")[0],
    }
    if shape != (side, side):
        about["shape"] = shape
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
    drawing = base.in_parts and lacks_priors(work.priors, key, prior.images)
    with base.whole() if drawing else nullcontext(), sampling_mode(base.models):
        chosen = (prior.images, base.family, base.models, base.world, prior.batch, watch.say)
        stop, beat = lambda: watch.stop.asked, lambda: watch.beat("prior")
        make_priors(work.priors, key, *chosen, stop=stop, beat=beat)
    if watch.stop.asked:
        raise StopRequested(f"stopped on request while drawing {key.prompt!r}; run the same command to go on")
