"""A perceptual distance of two pictures in LPIPS's form, from any transformers vision encoder.

LPIPS (arXiv 1801.03924, eq. 1) compares unit-length features place by place, layer by layer. Its learnt channel weights
exist for torchvision's networks only; here they are 1, which is the paper's unweighted baseline, over a ViT's patches.
Unlike the cosine of two [CLS] features, it also sees where things are, so it can tell two poses of one subject apart.
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

    The mean over layers and patches of half the squared difference of unit features, that is of 1 - cosine.
    """
    vision, marks = encoder.vision, encoder.marks
    pixels_NCHW = encoder.preprocess(images).to(vision.device, vision.dtype)
    hidden = vision(pixel_values=pixels_NCHW, output_hidden_states=True).hidden_states
    layers_NLPD = torch.nn.functional.normalize(torch.stack([layer[:, marks:] for layer in hidden], 1).double(), dim=-1)
    pairs = [1 - (layers_NLPD[i] * layers_NLPD[j]).sum(-1).mean() for i, j in combinations(range(len(images)), 2)]
    return torch.stack(pairs).cpu() if pairs else torch.zeros(0, dtype=torch.float64)
