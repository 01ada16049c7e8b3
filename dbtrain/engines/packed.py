"""The packed engine: AdamW over the rows of arenas. Each row is a subject with its own settings, step count and end.

No row reads another row's numbers: its gradient norm, clip, learning rate, bias correction and EMA are its own.
A row that is empty, done or no longer finite stays as it is in every bit. `where` keeps it so: a factor of 0 would not,
as 0 times NaN is NaN. Nothing in a step waits for the device, so that a step can be captured.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from dbtrain.engines.engine import EngineState, ParamGroup
from dbtrain.engines.loss_scale import KIND, LossScales
from dbtrain.errors import EngineError
from dbtrain.settings.config import TrainConfig
from dbtrain_kernels.adamw import adamw

KINDS = ("master", "exp_avg", "exp_avg_sq")
# PyTorch's layout warning concerns DDP; our gradients are strided views.
warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract", UserWarning)


class Arena:
    """The parameters of one group for N subjects: master, grad, Adam moments as tensors [N, P], a row a subject.

    The layers' parameters become views of `compute`, which is the masters themselves, or a copy of them in the compute
    precision; backward adds straight into `grad`.
    """

    def __init__(self, params: dict[str, nn.Parameter], ema: bool, dtype: torch.dtype):
        some = next(iter(params.values()))
        self.params, rows = params, len(some)
        sizes = [param[0].numel() for param in params.values()]
        ends = list(accumulate(sizes))
        self.spans = {name: slice(end - size, end) for name, size, end in zip(params, sizes, ends)}
        # float64 stays, for the tests; everything else trains in float32.
        wide = torch.promote_types(some.dtype, torch.float32)
        shape = (rows, ends[-1])
        self.tensors = {
            kind: torch.zeros(shape, dtype=wide, device=some.device) for kind in (*KINDS, *(["ema"] if ema else []))
        }
        self.compute = None if dtype == torch.float32 else torch.zeros(shape, dtype=dtype, device=some.device)
        source = self["master"] if self.compute is None else self.compute
        self.grad = torch.zeros_like(source)
        for name, param in params.items():
            param.data, param.grad = self.view(source, name), self.view(self.grad, name)

    def __getitem__(self, kind: str) -> Tensor:
        """The arena [N, P] of a kind of state; KeyError for an EMA that was not asked for."""
        return self.tensors[kind]

    def show(self, row: int) -> None:
        """Compute with a row's masters."""
        if self.compute is not None:
            self.compute[row] = self["master"][row]

    def view(self, arena: Tensor, name: str) -> Tensor:
        """A parameter's part of an arena, [N, ...]."""
        return arena[:, self.spans[name]].view(self.params[name].shape)


@dataclass(frozen=True)
class RowSettings:
    """What a subject's row trains with. rates: the learning rate of every step, for each group."""

    rates: Sequence[Sequence[float]]
    clip_norm: float | None
    weight_decay: float

    @property
    def steps(self) -> int:
        """The step after which the row is done."""
        return len(self.rates[0])


class PackedEngine:
    """N subjects' optimizers. `steps` is the most that any subject will make.

    step_N: updates made so far. live_N: rows that train. failed_N: rows that met a loss or gradient that is not finite,
    and stay at their last good state.
    """

    def __init__(self, groups: Sequence[ParamGroup], train: TrainConfig, steps: int, dtype: torch.dtype):
        self.train = train
        self.arenas = [Arena(group.params, train.ema is not None, dtype) for group in groups]
        rows, device = self.arenas[0].grad.shape[0], self.arenas[0].grad.device
        self.shapes: list[dict[str, torch.Size]] = [{} for _ in range(rows)]
        self.step_N = torch.zeros(rows, dtype=torch.long, device=device)
        self.end_N = torch.zeros_like(self.step_N)
        self.live_N = torch.zeros(rows, dtype=torch.bool, device=device)
        self.failed_N = torch.zeros_like(self.live_N)
        self.rates_GNS = torch.zeros(len(groups), rows, steps, dtype=torch.float64, device=device)
        self.clip_N = torch.full((rows,), math.inf, dtype=torch.float64, device=device)
        self.decay_N = torch.zeros_like(self.clip_N)
        self.scales = LossScales(rows, device) if dtype == torch.float16 else None
        """Loss scales in fp16, else None."""

    @property
    def rates_GN(self) -> Tensor:
        """The learning rate of each group that the rows' next step uses."""
        last = self.rates_GNS.shape[2] - 1
        index_N = self.step_N.clamp(max=last)
        return self.rates_GNS.gather(2, index_N[None, :, None].expand(len(self.rates_GNS), -1, 1))[..., 0]

    @torch.no_grad()
    def update(self, sound_N: Tensor) -> Tensor:
        """Gradient norm [N] of each row before clipping, after one step of each live row that is sound.

        sound_N: whether a row's loss is finite. All gradients are 0 afterwards. In fp16 a row whose gradient overflowed
        makes no step, though it counts one, and its norm is 0.
        """
        train, grads = self.train, self._grads()
        clips, joint_N = self._clips(grads)
        active_N = self.live_N & sound_N
        if joint_N is not None:
            active_N &= torch.isfinite(joint_N)
        made_N = self.step_N if self.scales is None else self.step_N - self.scales.skipped_N
        for arena, grad, clip_N, rate_N in zip(self.arenas, grads, clips, self.rates_GN):
            state = arena["master"], grad, arena["exp_avg"], arena["exp_avg_sq"]
            settings = made_N.clone(), rate_N, clip_N, self.decay_N, active_N, train.beta1, train.beta2, train.eps
            copy = arena.compute if self.scales is None else None
            norm_N = adamw(*state, *settings, arena.tensors.get("ema"), train.ema or 0.0, copy)
            arena.grad.zero_()
        norm_N = norm_N if joint_N is None else joint_N
        good_N = sound_N & torch.isfinite(norm_N)
        if self.scales is not None:
            self._follow(active_N & good_N)
            over_N = self.scales.update(good_N, self.live_N & sound_N)
            good_N, norm_N = good_N | over_N, torch.where(over_N, 0.0, norm_N)
        self.step_N += self.live_N & good_N
        self.failed_N |= self.live_N & ~good_N
        self.live_N &= good_N & (self.step_N < self.end_N)
        return norm_N

    def _grads(self) -> list[Tensor]:
        """The gradient [N, P] of each arena; in fp16 unscaled, in fp32."""
        if self.scales is None:
            return [arena.grad for arena in self.arenas]
        return [arena.grad.float() / self.scales.scale_N[:, None] for arena in self.arenas]

    def _follow(self, moved_N: Tensor) -> None:
        """Round the masters of rows that moved to their fp16 copies, which the kernel of the update cannot write."""
        for arena in self.arenas:
            if arena.compute is not None:
                rounded = arena["master"].to(arena.compute.dtype)
                arena.compute.copy_(torch.where(moved_N[:, None], rounded, arena.compute))

    def _clips(self, grads: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Clip threshold of each arena, chosen so that all arenas shrink by one factor; and the subject's joint norm
        (None with one arena). Why arenas are clipped together: docs/decisions/packed-equals-solo.md."""
        if len(self.arenas) == 1:
            return [self.clip_N], None
        norms = [torch.linalg.vector_norm(grad.to(arena["exp_avg"].dtype), dim=1)
                 for arena, grad in zip(self.arenas, grads)]  # fmt: skip
        joint_N = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        share_N = (self.clip_N / (joint_N.double() + 1e-6)).clamp(max=1.0)
        return [share_N * (norm_N.double() + 1e-6) for norm_N in norms], joint_N

    @torch.no_grad()
    def load(self, row: int, state: EngineState, step: int, settings: RowSettings) -> None:
        """Put a subject's state after `step` steps into a row. Adam moments that it lacks are 0; an EMA that it lacks
        starts at the masters.

        Its matrices may be smaller than the row's. The rest of the row is 0 and stays 0.
        """
        names = {name for arena in self.arenas for name in arena.params}
        if differing := names ^ state["master"].keys():
            raise EngineError(
                f"checkpoint and model differ in trained parameters, such as {sorted(differing)[0]}; "
                "were lora.targets changed?"
            )
        self.shapes[row] = {name: matrix.shape for name, matrix in state["master"].items()}
        for arena in self.arenas:
            for kind, tensor in arena.tensors.items():
                tensor[row] = 0
                source = state.get(kind, state["master"] if kind == "ema" else {})
                for name in arena.params.keys() & source.keys():
                    _corner(arena.view(tensor, name)[row], source[name].shape).copy_(source[name][0])
            arena.show(row)
            arena.grad[row] = 0
        if self.scales is not None:
            self.scales.load(row, state.get(KIND))
        self.step_N[row], self.end_N[row] = step, settings.steps
        self.clip_N[row] = math.inf if settings.clip_norm is None else settings.clip_norm
        self.decay_N[row] = settings.weight_decay
        for group, rates in enumerate(settings.rates):
            self.rates_GNS[group, row, : len(rates)] = torch.tensor(rates, dtype=torch.float64)
        self.failed_N[row], self.live_N[row] = False, step < settings.steps

    def state(self, row: int = 0) -> EngineState:
        """Everything to resume a subject from, at its own rank, copied to the CPU."""
        scaling = {} if self.scales is None else {KIND: self.scales.state(row)}
        return scaling | {
            kind: {
                name: _corner(arena.view(arena[kind], name)[row], self.shapes[row][name])[None].detach().cpu().clone()
                for arena in self.arenas
                for name in arena.params
            }
            for kind in self.arenas[0].tensors
        }

    @torch.no_grad()
    def show(self, row: int) -> None:
        """Make a row's layers compute with its masters."""
        for arena in self.arenas:
            arena.show(row)

    @torch.no_grad()
    def put(self, row: int, weights: Mapping[str, Tensor]) -> None:
        """Make weights of a row's own rank its masters: those that a subject which is done publishes."""
        for arena in self.arenas:
            for name in arena.params:
                _corner(arena.view(arena["master"], name)[row], weights[name].shape).copy_(weights[name][0])
            arena.show(row)

    @torch.no_grad()
    def release(self, row: int) -> None:
        """Make a row free. It still computes with the weights it holds, and none of them changes."""
        self.live_N[row] = self.failed_N[row] = False


def _corner(view: Tensor, shape: torch.Size) -> Tensor:
    """The part of a row's parameter that a matrix [1, ...] of a smaller rank fills."""
    return view[tuple(slice(side) for side in shape[1:])]
