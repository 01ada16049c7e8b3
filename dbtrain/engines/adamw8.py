"""AdamW that keeps each of its two moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861), in plain PyTorch.

256 numbers that follow each other are a block. A block is kept as its largest magnitude, the scale, in fp32, and for
each number a byte: the index of the level in [-1, 1] that is nearest to the number over the scale. Both moments of a
weight take 2 (1 + 4/256) bytes, not 8. Each step computes in fp32 with the moments it read, and rounds the new ones.

What was rounded once is not rounded again: the largest number of a block has level 1 or -1, so the block's scale comes
back to the bit, and each other number lies within an fp32 rounding of its level. So checkpoints hold the moments in
fp32 and by parameter, as those of `torch.optim.AdamW` do, and a training that goes on with the same blocks is the
unbroken one in every bit. With other blocks, as at another number of ranks, the moments are rounded once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256
"""Numbers that share a scale."""
PART = 2**22
"""Numbers that are in fp32 at once, a multiple of BLOCK: 16 MiB for each moment."""
LEAST = 2.0**-100
"""A block whose scale is less is 0: its smallest levels would leave fp32's normal numbers. In a second moment that is a
gradient of 1e-15, in a first one an update of 1e-22 learning rates, with an eps of 1e-8."""
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""What is kept in 8 bits, and whether it has a sign."""


@cache
def levels(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the 255 levels of a moment in rising order, the 254 numbers midway between two).

    The paper's dynamic levels: seven decades below 1, each evenly divided, and twice as finely as the one below it.
    The largest level is 1 itself, where the paper has 0.993 for negative numbers.
    """
    edges = [10.0 ** (decade - 6) * torch.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1, dtype=torch.float64)
             for decade in range(7)]  # fmt: skip
    positive = torch.cat([(edge[1:] + edge[:-1]) / 2 for edge in edges])
    positive[-1] = 1
    below = [-positive.flip(0)] if signed else []
    all_levels = torch.cat([*below, torch.zeros(1, dtype=torch.float64), positive])
    between = (all_levels[1:] + all_levels[:-1]) / 2
    return all_levels.float().to(device), between.float().to(device)


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes [n], uint8; scales [blocks], fp32) of numbers [n]; the last block may be shorter than the others."""
    blocks = functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    scales = torch.where(scales < LEAST, 0, scales)  # NaN stays NaN
    relative = blocks / torch.where(scales == 0, 1, scales)[:, None]
    codes = torch.bucketize(relative, levels(signed, values.device)[1], out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(values)], scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The numbers [n], fp32, that codes [n] and scales [blocks] stand for."""
    blocks = functional.pad(codes, (0, -len(codes) % BLOCK)).view(-1, BLOCK)
    values = levels(signed, codes.device)[0][blocks.int()] * scales[:, None]
    return values.view(-1)[: len(codes)]


class AdamW8(torch.optim.Optimizer):
    """`torch.optim.AdamW`'s update with moments in 8 bits. `start` must come before a parameter's first step."""

    def __init__(self, params: Iterable[Any], betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"betas": betas, "eps": eps, "weight_decay": weight_decay})

    def start(self, param: Tensor) -> None:
        """Give a parameter its state before the first step: all moments 0."""
        state: dict[str, Tensor] = {"step": torch.zeros(())}
        for kind in MOMENTS:
            state[f"{kind}_scales"] = param.new_zeros(-(-param.numel() // BLOCK), dtype=torch.float32)
            state[f"{kind}_codes"] = torch.zeros(param.numel(), dtype=torch.uint8, device=param.device)
        self.state[param] = state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        """PyTorch's operations in PyTorch's order, so that a step from moments of 0 gives its very weights."""
        (beta1, beta2), state = group["betas"], self.state[param]
        state["step"] += 1
        step = float(state["step"])
        rate, root = group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5
        weights, grads = param.view(-1), param.grad.reshape(-1)
        for part in parts(param.numel()):
            grad = grads[part].float()
            mean = self._read(state, "exp_avg", part).lerp_(grad, 1 - beta1)
            square = self._read(state, "exp_avg_sq", part).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            weights[part].mul_(1 - group["lr"] * group["weight_decay"])
            weights[part].addcdiv_(mean, (square.sqrt() / root).add_(group["eps"]), value=-rate)
            self._write(state, "exp_avg", part, mean)
            self._write(state, "exp_avg_sq", part, square)

    def widen(self, param: Tensor, kind: str) -> None:
        """Put a moment of a parameter into its state in fp32, under the name that `torch.optim.AdamW` has for it."""
        state, whole = self.state[param], torch.empty(param.numel(), device=param.device)
        for part in parts(param.numel()):
            whole[part] = self._read(state, kind, part)
        state[kind] = whole.view(param.shape)

    def narrow(self, param: Tensor, kind: str) -> None:
        """Take back a moment that `widen` put there: it may have another value now."""
        state = self.state[param]
        whole = state.pop(kind).view(-1)
        for part in parts(param.numel()):
            self._write(state, kind, part, whole[part])

    @staticmethod
    def _read(state: dict[str, Tensor], kind: str, part: slice) -> Tensor:
        return decode(state[f"{kind}_codes"][part], state[f"{kind}_scales"][_blocks(part)], MOMENTS[kind])

    @staticmethod
    def _write(state: dict[str, Tensor], kind: str, part: slice, values: Tensor) -> None:
        state[f"{kind}_codes"][part], state[f"{kind}_scales"][_blocks(part)] = encode(values, MOMENTS[kind])


def parts(numbers: int) -> Iterator[slice]:
    """Slices of at most PART numbers, which cut no block."""
    return (slice(first, min(first + PART, numbers)) for first in range(0, numbers, PART))


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
