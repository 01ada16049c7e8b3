"""The values that cross module borders.

Legend of shape letters, used as name suffixes: B samples, C channels, H height, W width, T or L tokens,
D features, O output features, N stacked subjects, R rank (in `error_NR`: roles), S steps of the noise schedule (in
`rates_GNS`: of training), G groups of parameters, P parameters of a subject in a group, V measured values. h and w are
the sides of latents. In `evaluate/`, N counts images, M photos, K values of an image, L layers, P patches.
Pixels are RGB in [-1, 1]; latents are in the model's own scale.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

ALIGNED = 16
"""Bytes to which tensors that are sent together are aligned."""

SUBJECT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What a subject's id may look like. The id becomes the name of a folder and a part of shard keys."""

OWN = "own_caption"
"""Name in `Sample.meta` that is True where the caption is the photo's own, and not its subject's."""


class Role(IntEnum):
    """What a sample is for: the subject itself, or its class (prior preservation)."""

    INSTANCE = 0
    PRIOR = 1


@dataclass(frozen=True)
class Subject:
    """One row of a manifest: a thing to learn. `images` are resolved photo paths in a fixed order, `masks` those of the
    column `mask`.

    Overrides are None where the run's configuration holds. captions: a template for each photo, empty where `caption`
    or the run's template holds; None where that is so for all of them.
    """

    id: str
    class_noun: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...] = ()
    caption: str | None = None
    captions: tuple[str, ...] | None = None
    identifier: str | None = None
    seed: int | None = None
    steps: int | None = None
    lr: float | None = None
    rank: int | None = None
    prior_weight: float | None = None


@dataclass(frozen=True)
class Sample:
    """One stored image with its provenance, as it comes out of a shard. `image` is the encoded file's bytes.

    mask: a grey PNG of the image's size, white where the subject is; None where there is none.
    """

    key: str
    subject: str
    role: Role
    caption: str
    image: bytes
    extension: str
    meta: dict = field(default_factory=dict)
    mask: bytes | None = None


@dataclass(frozen=True)
class Tensors:
    """Base of the values made of tensors: all of them are moved and indexed together; absent ones stay None."""

    def to(self, *args, **kwargs):
        """The same value with every tensor moved or cast as `Tensor.to` does; a dtype is for floats alone, so that
        masks and ids stay what they are."""

        def moved(tensor):
            there = tensor.to(*args, **kwargs)
            return there if tensor.is_floating_point() else tensor.to(there.device)

        return self.map(moved)

    def sent(self, device):
        """The same value on a device; all that the host holds goes to a GPU in one copy. See the function `sent`."""
        if not str(device).startswith("cuda"):
            return self.map(lambda tensor: sent(tensor, device))
        present = (getattr(self, own.name) for own in fields(self))
        host = [tensor for tensor in present if tensor is not None and tensor.device.type == "cpu"]
        moved = dict(zip(map(id, host), sent_together(host, device)))
        return self.map(lambda tensor: moved.get(id(tensor), tensor))

    def __getitem__(self, index):
        """The rows of every tensor at an index."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function):
        """The same value with a function applied to every tensor."""
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: function(value) for name, value in present.items()})


def sent(tensor: Tensor, device: object) -> Tensor:
    """The tensor on a device (by name, or a torch.device), by a copy that the host does not wait for.

    CUDA reads memory by itself only where it is pinned. From other memory the host may wait until the copy, and all
    that was launched before it, is done, and `set_sync_debug_mode` does not see that.
    """
    if tensor.device.type == "cpu" and str(device).startswith("cuda"):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sent_together(tensors: Sequence[Tensor], device: object) -> list[Tensor]:
    """The tensors on a device, as views of one buffer, by one copy; the buffer is pinned where there is a GPU."""
    import torch  # tables of settings use this module without it

    places = [0, *accumulate(-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors)]
    buffer = torch.empty(places[-1], dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def views(whole: Tensor) -> list[Tensor]:
        parts = (whole[place : place + tensor.nbytes] for place, tensor in zip(places, tensors))
        return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]

    for place, tensor in zip(views(buffer), tensors):
        place.copy_(tensor)
    return views(buffer.to(device, non_blocking=True))


@dataclass(frozen=True)
class Conditioning(Tensors):
    """The encoded caption that a denoiser takes. Only a `Family` makes one.

    states_BTD: token states; layers that are tapped together lie side by side along D. pooled_BD: a pooled text
    embedding (SDXL), or None. mask_BT: bool, True where a token is real; None where the denoiser sees padding too.
    """

    states_BTD: Tensor
    pooled_BD: Tensor | None = None
    mask_BT: Tensor | None = None


@dataclass(frozen=True)
class Batch(Tensors):
    """One micro-batch of one rank.

    images_BCHW: VAE moments (mean and log-variance stacked along C), or pixels where latents are not cached.
    caption_B: row of each sample's caption in the bank. role_B: `Role`. slot_B: draw slot in the global batch; instance
    samples have slots 0..batch-1, prior samples batch..2*batch-1. size_B6: original height and width, crop top and
    left, target height and width in pixels (SDXL's micro-conditioning, arXiv 2307.01952, section 2.2). subject_B: each
    sample's row in a pack, subject-major; None where there is one subject. mask_B1HW: factors of the squared error of
    each latent cell; None stands for 1.

    For denoisers that enlarge: low_BCHW is the same crop reduced to the low resolution, in pixels. guide_BCHW is what
    the training step makes of it, enlarged and noised, and level_B the noise level that the denoiser is told.
    """

    images_BCHW: Tensor
    caption_B: Tensor
    role_B: Tensor
    slot_B: Tensor
    size_B6: Tensor
    subject_B: Tensor | None = None
    mask_B1HW: Tensor | None = None
    low_BCHW: Tensor | None = None
    guide_BCHW: Tensor | None = None
    level_B: Tensor | None = None


@dataclass(frozen=True)
class StepLoss:
    """The loss of a micro-batch: loss == (per_sample_B * weight_B).sum(), which is the fused kernel's contract."""

    loss: Tensor
    per_sample_B: Tensor
    weight_B: Tensor


class Parts(NamedTuple):
    """A denoiser's weights on disk. make() -> the denoiser, its weights as they come. names: its tensors on disk.
    tensor(name) -> one of them, on the CPU."""

    make: Callable[[], nn.Module]
    names: Sequence[str]
    tensor: Callable[[str], Tensor]
