"""Distances of two pictures by packages that a user may install beside dbtrain: LPIPS, which the paper's DIV uses, and
DreamSim. Both need torchvision and fetch their weights at first use. Like all installed code, they are trusted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.evaluate.features import Preprocess

AUTO, PATCHES = "auto", "patches"

Pairs = Callable[[Sequence[Image.Image]], Tensor]
"""Distances [N (N - 1) / 2], float64, of all pairs of N pictures."""


class Distance(NamedTuple):
    """A package's distance: its name in reports, and the function."""

    name: str
    pairs: Pairs


def _lpips(device: str) -> Distance:
    import lpips

    metric = lpips.LPIPS(net="alex", verbose=False).eval()
    pixels = Preprocess(None, None, 0, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    return Distance("LPIPS (alex)", lambda images: _all_pairs(metric, (pixels([image]) for image in images)))


def _dreamsim(device: str) -> Distance:
    from dreamsim import dreamsim

    metric, pixels = dreamsim(device=device, cache_dir=str(Path(torch.hub.get_dir()) / "dreamsim"))
    prepared = lambda images: (pixels(image).to(device) for image in images)  # noqa: E731
    return Distance("DreamSim (ensemble)", lambda images: _all_pairs(metric, prepared(images)))


@torch.no_grad()
def _all_pairs(metric: Callable[[Tensor, Tensor], Tensor], pixels: Iterable[Tensor]) -> Tensor:
    pairs = [metric(a, b).flatten() for a, b in combinations(list(pixels), 2)]
    return torch.cat(pairs).double().cpu() if pairs else torch.zeros(0, dtype=torch.float64)


PACKAGES: dict[str, Callable[[str], Distance]] = {"lpips": _lpips, "dreamsim": _dreamsim}
"""The function that loads each package's distance on a device, by the package's name."""
CHOICES = (AUTO, *PACKAGES, PATCHES)


def load_distance(choice: str = AUTO, device: str = "cpu") -> tuple[Distance | None, str]:
    """(the package's distance, a note). The distance is None where the patch distance, which needs no package, is used.

    `auto` is LPIPS if it is installed and works; if it is installed but fails, the note says why. The note is empty
    otherwise. Raises ConfigError if a package that was named does not work.
    """
    if choice not in CHOICES:
        raise ConfigError(f"--distance: got {choice!r}, want {', '.join(CHOICES)}")
    name = "lpips" if choice == AUTO else choice
    if choice == PATCHES or (choice == AUTO and importlib.util.find_spec(name) is None):
        return None, ""
    try:
        return PACKAGES[name](device), ""
    except Exception as error:  # a package that does not fit the installed torch can fail with any exception
        reason = f"{name} does not work here ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        if choice == AUTO:
            return None, f"{reason}; DIV is the patch distance instead"
        raise ConfigError(f"--distance: {reason}; install it beside torchvision, or take --distance patches") from error
