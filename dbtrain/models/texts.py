"""Texts encoded apart from the denoiser: text encoders are loaded to encode, and not kept beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from dbtrain.values import Conditioning

Group = tuple[str, ...]
"""Texts that are encoded together. The number of rows can change the last bits of a matrix product, so a text is found
again only in the group that it was encoded in."""


@dataclass
class Texts:
    """What groups of texts were encoded as, on the CPU, and how more are encoded.

    load() -> the text encoders by name, frozen, on the CPU. encode(text encoders, group, device) -> its conditioning.
    """

    load: Callable[[], dict[str, nn.Module]]
    encode: Callable[[dict[str, nn.Module], Group, str], Conditioning]
    kept: dict[Group, Conditioning] = field(default_factory=dict)

    @torch.no_grad()
    def keep(self, groups: Iterable[Group], device: str) -> None:
        """Encode the groups that are not known yet, all with one loading of the encoders."""
        missing = [group for group in dict.fromkeys(groups) if group not in self.kept]
        if not missing:
            return
        encoders = {name: module.to(device) for name, module in self.load().items()}
        for group in missing:
            self.kept[group] = self.encode(encoders, group, device).to("cpu")
        del encoders
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # else the allocator would keep the encoders' memory from other programs

    def forget(self, but: Iterable[Group]) -> None:
        """Drop what was encoded, but for these groups."""
        self.kept = {group: self.kept[group] for group in but if group in self.kept}

    def of(self, group: Group, device: str) -> Conditioning:
        """A group's conditioning on a device."""
        self.keep([group], device)
        return self.kept[group].to(device)

    def each(self, texts: Sequence[str], device: str) -> Conditioning:
        """The conditioning of texts that were each encoded alone, one row for each, equal texts too."""
        self.keep([(text,) for text in texts], device)
        return joined([self.kept[text,] for text in texts]).to(device)


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """One conditioning of the rows of several with the same number of tokens."""
    names = [one.name for one in fields(Conditioning) if getattr(parts[0], one.name) is not None]
    return Conditioning(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@contextmanager
def set_aside(module: nn.Module, device: str) -> Iterator[None]:
    """The module on the CPU, so that its device has room; afterwards back there. Nothing may have recorded where its
    weights lie."""
    if not device.startswith("cuda"):
        yield
        return
    module.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        module.to(device)
