"""A perceptual distance of two pictures in LPIPS's form, from any transformers vision encoder.

LPIPS (arXiv 1801.03924, eq. 1) compares unit-length features place by place, layer by layer. Its learnt channel weights
exist for torchvision's networks only. Here they are 1, which is the paper's unweighted baseline, over a ViT's patches.
The cosine of two [CLS] features ignores where things are; this distance does not, so two poses of one subject differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from PIL import Image
from torch import Tensor

from dbtrain.evaluate.features import Encoder


@torch.no_grad()
def patch_distances(encoder: Encoder, images: Sequence[Image.Image]) -> Tensor:
    """Distances [N (N - 1) / 2] of all pairs of pictures, float64, in [0, 2].

    The mean over layers and patches of half the squared difference of unit features. For unit a and b, half of
    |a - b|^2 is 1 - cosine(a, b), which is computed here.
    """
    vision, marks = encoder.vision, encoder.marks
    pixels_NCHW = encoder.preprocess(images).to(vision.device, vision.dtype)
    hidden = vision(pixel_values=pixels_NCHW, output_hidden_states=True).hidden_states
    layers_NLPD = torch.nn.functional.normalize(torch.stack([layer[:, marks:] for layer in hidden], 1).double(), dim=-1)
    pairs = [1 - (layers_NLPD[i] * layers_NLPD[j]).sum(-1).mean() for i, j in combinations(range(len(images)), 2)]
    return torch.stack(pairs).cpu() if pairs else torch.zeros(0, dtype=torch.float64)
