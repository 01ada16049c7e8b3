"""The encoders of an evaluation, and the features that they give of one subject's photos and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dbtrain.evaluate.distances import AUTO, Distance, load_distance
from dbtrain.evaluate.features import EMBEDDED, Encoder, load_identity, load_pair
from dbtrain.evaluate.patches import patch_distances
from dbtrain.evaluate.scores import SubjectFeatures

THUMBNAIL = 16
"""Side, in pixels, of the small pictures that are compared to find copies."""


@dataclass(frozen=True)
class Seen:
    """Drawn pictures for the judge: their files, the number of each picture's prompt, and the prompts' texts.

    plain: each picture's prompt without the identifier. prompts: the same with the identifier; None for pictures of the
    base model, which knows no identifier.
    """

    files: Sequence[Path]
    prompt_N: Tensor
    plain: Sequence[str]
    prompts: Sequence[str] | None = None


@dataclass
class Judge:
    """The loaded encoders.

    distance: of DIV; None is the patch distance. note: why it is not the expected one, or empty. kept: features of
    pictures that many subjects share.
    """

    identity: Encoder
    pair: Encoder
    distance: Distance | None = None
    note: str = ""
    kept: dict[tuple[str, Path], Tensor] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """The name of what fills each role of `Metric.encoder`: identity (DINO's role), clip, distance (of DIV)."""
        distance = self.distance.name if self.distance else f"patch distance of {self.identity.name}"
        return {"identity": self.identity.name, "clip": self.pair.name, "distance": distance}

    def features(
        self, photos: Sequence[Image.Image], drawn: Seen, of_class: Sequence[Path], keep: bool = False
    ) -> SubjectFeatures:
        """The features of a subject's photos, of pictures drawn for it, and of pictures of the class prompt.

        keep: keep the pictures' features by file, for the next subject of the class.
        """
        distance_pairs, pair_prompt = self._distances(drawn)
        return SubjectFeatures(
            real_identity_MD=self.identity.images(photos),
            real_clip_MD=self.pair.images(photos),
            generated_identity_ND=self._images("identity", drawn.files, keep),
            generated_clip_ND=self._images("pair", drawn.files, keep),
            prompt_N=drawn.prompt_N,
            texts_with_identifier_ND=self.pair.texts(drawn.prompts or []),
            texts_without_identifier_ND=self.pair.texts(drawn.plain),
            class_identity_PD=self._images("identity", of_class, keep),
            distance_pairs=distance_pairs,
            pair_prompt=pair_prompt,
        )

    def _images(self, role: str, files: Sequence[Path], keep: bool) -> Tensor:
        encoder: Encoder = getattr(self, role)
        if not keep:
            return encoder.images(read_images(files))
        new = [file for file in files if (role, file) not in self.kept]
        self.kept |= {(role, file): row for file, row in zip(new, encoder.images(read_images(new)))}
        return torch.stack([self.kept[role, file] for file in files]) if files else encoder.images([])

    def _distances(self, drawn: Seen) -> tuple[Tensor, Tensor]:
        """(distances of all pairs of pictures of one prompt, the prompt's number of each pair)."""
        distances, prompts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.long)]
        for number in drawn.prompt_N.unique():
            images = read_images([file for file, own in zip(drawn.files, drawn.prompt_N) if own == number])
            distances.append(self.distance.pairs(images) if self.distance else patch_distances(self.identity, images))
            prompts.append(number.expand(len(distances[-1])))
        return torch.cat(distances), torch.cat(prompts)


def load_judge(identity: str = EMBEDDED, clip: str = EMBEDDED, device: str = "cpu", distance: str = AUTO) -> Judge:
    """The encoders by folder, hub id or `embedded`, and a distance. Raises ConfigError if one cannot fill its role."""
    package, note = load_distance(distance, device)
    return Judge(load_identity(identity, device), load_pair(clip, device), package, note)


def read_images(files: Sequence[Path]) -> list[Image.Image]:
    """The pictures, RGB."""
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    return images


def likeness(pictures: Sequence[Image.Image], photos: Sequence[Image.Image]) -> Tensor:
    """Correlation [N, M] of small square versions of every picture with every photo: 1 is the same picture."""
    return _thumbnails(pictures) @ _thumbnails(photos).T


def _thumbnails(images: Sequence[Image.Image]) -> Tensor:
    """Unit rows [N, 3 * THUMBNAIL^2] of zero mean."""
    rows = []
    for image in images:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        small = image.convert("RGB").crop((left, top, left + side, top + side))
        small = small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        rows.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).double())
    pixels_ND = torch.stack(rows) if rows else torch.zeros(0, 3 * THUMBNAIL**2, dtype=torch.float64)
    return torch.nn.functional.normalize(pixels_ND - pixels_ND.mean(1, keepdim=True), dim=1)
